"""The batch assignment against brute force."""

from __future__ import annotations

from itertools import product
from math import inf, isinf

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.assignment import assign


def total(choice: list[int | None], costs: list[list[float]], congestion: list[float]) -> float:
    """What the assignment costs, congestion included."""
    direct = sum(costs[request][replica] for request, replica in enumerate(choice) if replica is not None)
    counts = [sum(replica == other for replica in choice) for other in range(len(congestion))]
    return direct + sum(each * count * (count - 1) / 2 for each, count in zip(congestion, counts, strict=True))


def best(costs: list[list[float]], room: list[int], congestion: list[float], served: list[bool]) -> float:
    """The least cost at which the requests of `served` can be served, by trying everything."""
    options = [range(len(room)) if one else (None,) for one in served]
    return min(
        total(list(choice), costs, congestion)
        for choice in product(*options)
        if all(choice.count(replica) <= limit for replica, limit in enumerate(room))
    )


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 3))
def test_is_optimal(data: st.DataObject, requests: int, replicas: int) -> None:
    cost = st.one_of(st.integers(0, 20).map(float), st.just(inf))
    costs = data.draw(
        st.lists(st.lists(cost, min_size=replicas, max_size=replicas), min_size=requests, max_size=requests)
    )
    room = data.draw(st.lists(st.integers(0, 3), min_size=replicas, max_size=replicas))
    congestion = data.draw(st.lists(st.integers(0, 10).map(float), min_size=replicas, max_size=replicas))
    choice = assign(costs, room, congestion)
    assert all(choice.count(replica) <= limit for replica, limit in enumerate(room))
    assert not isinf(total(choice, costs, congestion))
    served = [one is not None for one in choice]
    assert abs(total(choice, costs, congestion) - best(costs, room, congestion, served)) < 1e-6


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_earlier_ones_are_served_first(data: st.DataObject, requests: int) -> None:
    costs = data.draw(
        st.lists(st.lists(st.sampled_from((1.0, inf)), min_size=2, max_size=2), min_size=requests, max_size=requests)
    )
    room = [1, 1]
    choice = assign(costs, room, [0.0, 0.0])
    for count in range(1, requests + 1):
        prefix = assign(costs[:count], room, [0.0, 0.0])
        assert [one is not None for one in prefix] == [one is not None for one in choice[:count]]


def test_an_earlier_request_moves_so_that_a_later_one_fits() -> None:
    assert assign([[1.0, 2.0], [1.0, inf]], [1, 1], [0.0, 0.0]) == [1, 0]


def test_greedy_choice_per_request_would_cost_more() -> None:
    costs = [[1.0, 2.0], [1.0, 9.0]]
    assert assign(costs, [1, 1], [0.0, 0.0]) == [1, 0]


def test_congestion_spreads_equal_requests() -> None:
    choice = assign([[1.0, 1.5]] * 4, [9, 9], [1.0, 1.0])
    assert sorted(choice, key=str) == [0, 0, 1, 1]


def test_no_room_is_no_place() -> None:
    assert assign([[1.0]], [0], [0.0]) == [None]
    assert assign([[inf]], [5], [0.0]) == [None]
    assert assign([], [5], [0.0]) == []
