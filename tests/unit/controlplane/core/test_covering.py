"""Which shards spares keep ready."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import example, given
from hypothesis import strategies as st

from controlplane.core.covering import Choice, Loss, Spot, choose
from controlplane.runtime.ids import NodeId, ReplicaId


def losses(*places: str, replica: str = "m-0") -> list[Loss]:
    """ "w1:0,1": what w1's death takes."""
    found = [place.split(":") for place in places]
    return [
        Loss(ReplicaId(replica), NodeId(node), tuple(int(rank) for rank in ranks.split(","))) for node, ranks in found
    ]


def spots(*places: str, failed: str = "") -> list[Spot]:
    """ "w3/0" or "w3/0=2", if it holds rank 2 already."""
    found: list[Spot] = []
    for place in places:
        where, _, rank = place.partition("=")
        node, device = where.split("/")
        found.append(Spot(NodeId(node), device, int(rank) if rank else None, int(where == failed)))
    return found


def shown(chosen: Mapping[tuple[NodeId, str], Choice]) -> str:
    return " ".join(f"{node}/{device}={choice.rank}" for (node, device), choice in sorted(chosen.items()))


TWO_STAGES = losses("w1:0,1", "w2:2,3")


def test_all_that_dies_together_is_covered_together() -> None:
    assert shown(choose(TWO_STAGES, spots("w3/0", "w3/1"), 2)) == "w3/0=0 w3/1=1"


def test_what_can_be_covered_whole_comes_first() -> None:
    assert shown(choose(losses("w1:0,1,2", "w2:3"), spots("w3/0"), 1)) == "w3/0=3"


def test_every_loss_then_every_loss_again() -> None:
    places = spots(*(f"w3/{index}" for index in range(6)))
    assert shown(choose(TWO_STAGES, places, 4)) == "w3/0=0 w3/1=1 w3/2=2 w3/3=3"
    assert shown(choose(TWO_STAGES, places, 6)) == "w3/0=0 w3/1=1 w3/2=2 w3/3=3 w3/4=0 w3/5=1"


def test_no_more_than_are_wanted_or_there() -> None:
    assert shown(choose(TWO_STAGES, spots("w3/0", "w3/1", "w3/2"), 1)) == "w3/0=0"
    assert shown(choose(TWO_STAGES, spots("w3/0"), 64)) == "w3/0=0"
    assert shown(choose([], spots("w3/0"), 64)) == ""


def test_never_on_the_node_that_dies_if_there_is_another() -> None:
    assert shown(choose(TWO_STAGES, spots("w1/2", "w1/3", "w2/2", "w2/3"), 4)) == "w1/2=2 w1/3=3 w2/2=0 w2/3=1"
    chosen = choose(losses("w1:0"), spots("w1/1"), 1)
    assert chosen[NodeId("w1"), "1"].reason.text == "rank 0 of m-0 on its own node w1: no other has a free device"


def test_what_another_node_can_cover_comes_before_what_its_own_would() -> None:
    assert shown(choose(TWO_STAGES, spots("w1/2", "w1/3", "w1/4"), 3)) == "w1/2=2 w1/3=3 w1/4=0"


def test_one_shard_covers_all_replicas_that_run_it() -> None:
    both = losses("w1:0,1") + losses("w2:0,1", replica="m-1")
    assert shown(choose(both, spots("w3/0", "w3/1"), 2)) == "w3/0=0 w3/1=1"


def test_a_tensor_group_stays_on_one_node() -> None:
    assert shown(choose(losses("w1:0,1"), spots("w3/0", "w4/0", "w4/1"), 2)) == "w4/0=0 w4/1=1"


def test_what_is_held_stays_where_it_is() -> None:
    assert shown(choose(TWO_STAGES, spots("w3/0=3", "w3/1=2"), 2)) == "w3/0=3 w3/1=2"
    assert shown(choose(losses("w1:0,1"), spots("w3/0=1", "w4/0", "w4/1"), 2)) == "w3/0=1 w4/0=0"


def test_a_device_whose_preloads_fail_is_left_for_another() -> None:
    assert shown(choose(losses("w1:0"), spots("w3/0", "w4/0", failed="w3/0"), 1)) == "w4/0=0"


@example(tensor=2, stages=2, places=[0, 0, 0], count=3)
@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(0, 3), max_size=8), st.integers(0, 8))
def test_the_choice_is_stable(tensor: int, stages: int, places: list[int], count: int) -> None:
    lost = [
        Loss(ReplicaId("m-0"), NodeId(f"w{stage}"), tuple(range(stage * tensor, (stage + 1) * tensor)))
        for stage in range(stages)
    ]
    free = [Spot(NodeId(f"w{node}"), f"free{index}") for index, node in enumerate(places)]
    chosen = choose(lost, free, count)
    assert len(chosen) == min(count, len(free))
    held = [
        Spot(spot.node, spot.device, choice.rank if (choice := chosen.get((spot.node, spot.device))) else None)
        for spot in free
    ]
    again = choose(lost, held, count)
    assert {place: choice.rank for place, choice in again.items()} == {
        place: choice.rank for place, choice in chosen.items()
    }
