"""Order, bounds and removal of waiting requests."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.fair_queue import FairQueue, Ticket
from controlplane.runtime.ids import RequestId


def ticket(name: str, *, priority: int = 0, replay: bool = False, tenant: str = "") -> Ticket:
    return Ticket(request=RequestId(name), priority=priority, replay=replay, tenant=tenant)


def names(tickets: list[Ticket]) -> list[str]:
    return [one.request for one in tickets]


def test_priority_then_replays_then_age() -> None:
    queue = FairQueue()
    for one in (
        ticket("old"),
        ticket("new"),
        ticket("replay", replay=True),
        ticket("urgent", priority=1),
        ticket("idle replay", priority=-1, replay=True),
    ):
        queue.push(one)
    assert names(queue.take(9)) == ["urgent", "replay", "old", "new", "idle replay"]


def test_tenants_take_turns_within_a_priority() -> None:
    queue = FairQueue()
    for name in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.push(ticket(name, tenant=name[0]))
    assert names(queue.take(9)) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_turns_go_on_between_takes() -> None:
    queue = FairQueue()
    for name in ("a1", "a2", "b1", "b2"):
        queue.push(ticket(name, tenant=name[0]))
    assert names(queue.take(1)) == ["a1"]
    assert names(queue.take(3)) == ["b1", "a2", "b2"]


def test_restored_tickets_stand_in_front_in_order() -> None:
    queue = FairQueue()
    for name in ("a1", "a2", "b1", "c1"):
        queue.push(ticket(name, tenant=name[0]))
    taken = queue.take(3)
    queue.restore(taken[1:])
    assert names(queue.take(9)) == [*names(taken[1:]), "a2"]


def test_only_new_ones_count_against_the_bound() -> None:
    queue = FairQueue()
    queue.push(ticket("new"))
    queue.push(ticket("replay", replay=True))
    assert (len(queue), queue.new) == (2, 1)
    assert queue.discard(RequestId("new"))
    assert not queue.discard(RequestId("new"))
    assert (len(queue), queue.new) == (1, 0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 1), st.booleans(), st.sampled_from("abc")), max_size=30),
    st.data(),
)
def test_nothing_is_lost_or_doubled(kinds: list[tuple[int, bool, str]], data: st.DataObject) -> None:
    queue = FairQueue()
    inside: set[str] = set()
    for index, (priority, replay, tenant) in enumerate(kinds):
        queue.push(ticket(str(index), priority=priority, replay=replay, tenant=tenant))
        inside.add(str(index))
        taken = queue.take(data.draw(st.integers(0, 3)))
        keep = data.draw(st.integers(0, len(taken)))
        queue.restore(taken[keep:])
        inside -= set(names(taken[:keep]))
        assert set(queue) == inside
        assert len(queue) == len(inside)
    assert sorted(names(queue.take(99))) == sorted(inside)
    assert queue.new == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30))
def test_no_tenant_waits_for_more_than_one_turn_of_the_others(tenants: list[str]) -> None:
    queue = FairQueue()
    for index, tenant in enumerate(tenants):
        queue.push(ticket(str(index), tenant=tenant))
    order = [one.tenant for one in queue.take(99)]
    for position, tenant in enumerate(order):
        waiting = set(order[position:])
        assert set(order[position : position + len(waiting)]) == waiting, tenant
