"""Where ranks go, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.degrees import named, smaller
from controlplane.core.placement import plan
from controlplane.core.stock import FreeDevice, FreeNode, Shard, Wanted
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from controlplane.runtime.messages.common import Member, ParallelDegrees, ReasonKind

M = DeploymentId("m")


def node(
    name: str, count: int = 1, held: dict[int, int] | None = None, degrees: ParallelDegrees | None = None
) -> FreeNode:
    """`held`: device index to the rank whose weights of M it holds."""
    held = held or {}
    degrees = degrees or ParallelDegrees()
    free = tuple(
        FreeDevice(device=f"cpu:{i}", held=Shard(M, degrees, held[i]) if i in held else None) for i in range(count)
    )
    return FreeNode(node=NodeId(name), host=f"{name}.host", free=free)


def wanted(index: int = 0, tensor: int = 1, pipeline: int = 1, previous: str = "") -> Wanted:
    """`previous`: "w1/0 w1/1" names the devices it had, in rank order."""
    members = tuple(
        Member(rank=rank, node=NodeId(at.split("/")[0]), device=f"cpu:{at.split('/')[1]}", host="h")
        for rank, at in enumerate(previous.split())
    )
    degrees = ParallelDegrees(tensor=tensor, pipeline=pipeline)
    return Wanted(replica=ReplicaId(f"m-{index}"), deployment=M, degrees=degrees, previous=members)


def places(want: Wanted, nodes: list[FreeNode], siblings: dict[str, int] | None = None) -> str:
    counts = {(M, NodeId(name)): count for name, count in (siblings or {}).items()}
    made = plan([want], nodes, counts)[want.replica]
    assert [member.rank for member in made.members] == list(range(len(made.members)))
    return " ".join(f"{member.node}/{member.device[-1]}" for member in made.members)


def test_one_node_before_several() -> None:
    assert places(wanted(tensor=2), [node("w1"), node("w2"), node("w3", 2)]) == "w3/0 w3/1"


def test_the_tightest_node_that_fits() -> None:
    assert places(wanted(), [node("w1", 4), node("w2", 1)]) == "w2/0"


def test_whole_tensor_groups_a_node() -> None:
    assert places(wanted(tensor=2, pipeline=2), [node("w1", 3), node("w2", 2)]) == "w2/0 w2/1 w1/0 w1/1"


def test_a_tensor_group_is_cut_only_at_last() -> None:
    assert places(wanted(tensor=2), [node("w1"), node("w2")]) == "w1/0 w2/0"


def test_nothing_fits() -> None:
    made = plan([wanted(tensor=2, previous="w1/0 w9/0")], [node("w1")], {})[ReplicaId("m-0")]
    assert made.members == ()
    assert made.reason.kind is ReasonKind.NO_CAPACITY
    assert made.reason.text == "m-0 needs 2 devices, 1 free; waits for w9 to come back"


def test_replicas_spread_over_nodes() -> None:
    assert places(wanted(), [node("w1", 4), node("w2", 4)], {"w1": 1}) == "w2/0"


def test_spread_before_warm_weights() -> None:
    assert places(wanted(), [node("w1", held={0: 0}), node("w2")], {"w1": 1}) == "w2/0"


def test_warm_weights_before_the_former_node() -> None:
    assert places(wanted(previous="w1/0"), [node("w1"), node("w2", held={0: 0})]) == "w2/0"


def test_the_former_node_and_device() -> None:
    assert places(wanted(previous="w2/1"), [node("w1", 2), node("w2", 2)]) == "w2/1"


def test_each_rank_gets_the_device_that_holds_its_weights() -> None:
    held = node("w1", 3, held={0: 1, 2: 0}, degrees=ParallelDegrees(tensor=2))
    assert places(wanted(tensor=2), [held]) == "w1/2 w1/0"


def test_a_device_that_holds_other_weights_is_taken_last() -> None:
    assert places(wanted(), [node("w1", 2, held={0: 7})]) == "w1/1"


def test_who_can_return_chooses_first() -> None:
    homeless, returning = wanted(0, previous="w9/0"), wanted(1, previous="w1/0")
    made = plan([homeless, returning], [node("w1"), node("w2", 2)], {})
    assert made[ReplicaId("m-1")].members[0].node == "w1"
    assert made[ReplicaId("m-0")].members[0].node == "w2"


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=4),
)
def test_no_device_twice_and_all_or_nothing(sizes: list[int], degrees: list[tuple[int, int]]) -> None:
    nodes = [node(f"w{index}", size) for index, size in enumerate(sizes)]
    wants = [wanted(index, tensor, pipeline) for index, (tensor, pipeline) in enumerate(degrees)]
    plans = plan(wants, nodes, {})
    used = Counter((member.node, member.device) for made in plans.values() for member in made.members)
    assert all(count == 1 for count in used.values())
    free = {(one.node, device.device) for one in nodes for device in one.free}
    assert used.keys() <= free
    for want in wants:
        ranks = want.degrees.tensor * want.degrees.pipeline
        members = plans[want.replica].members
        assert len(members) in (0, ranks)
        if not members:
            assert ranks > len(free) - sum(used.values())


# ---------------------------------------------------------------- shrunk


def shrunk(nodes: list[FreeNode], tensor: int, pipeline: int = 1, above: int = 0) -> tuple[str, str]:
    """Where a replica goes that may be shrunk, and with which degrees."""
    want = wanted(tensor=tensor, pipeline=pipeline)
    want = replace(want, smaller=smaller(want.degrees, above))
    made = plan([want], nodes, {})[want.replica]
    return " ".join(f"{member.node}/{member.device[-1]}" for member in made.members), named(made.degrees)


def test_as_many_ranks_as_there_are_devices_for() -> None:
    assert shrunk([node("w1", 3)], tensor=4) == ("w1/0 w1/1", "tp2")
    assert shrunk([node("w1", 3)], tensor=2, pipeline=4) == ("w1/0 w1/1 w1/2", "pp3")


def test_full_degrees_if_they_have_a_place() -> None:
    assert shrunk([node("w1", 2), node("w2", 2)], tensor=4) == ("w1/0 w1/1 w2/0 w2/1", "tp4")


def test_tensor_groups_on_one_node_before_larger_ones() -> None:
    assert shrunk([node("w1", 2), node("w2", 2)], tensor=4, pipeline=2) == ("w1/0 w1/1 w2/0 w2/1", "tp2×pp2")
    assert shrunk([node("w1", 4)], tensor=4, pipeline=2) == ("w1/0 w1/1 w1/2 w1/3", "tp4")


def test_stages_before_a_cut_tensor_group() -> None:
    assert shrunk([node("w1"), node("w2")], tensor=2, pipeline=2) == ("w1/0 w2/0", "pp2")


def test_nothing_at_or_below_what_was_too_few() -> None:
    assert shrunk([node("w1", 2)], tensor=4, above=2) == ("", "tp4")


def test_full_replicas_take_their_place_first() -> None:
    first, second = (replace(wanted(index, tensor=4), smaller=smaller(wanted(tensor=4).degrees)) for index in range(2))
    made = plan([first, second], [node("w1", 6)], {})
    assert [named(made[ReplicaId(name)].degrees) for name in ("m-0", "m-1")] == ["tp4", "tp2"]
    assert made[ReplicaId("m-1")].reason.text == "shrunk from tp4 to tp2 on one node: 2 devices free, 4 needed"


# ---------------------------------------------------------------- survivors and spares

TP2, TP2_PP2 = ParallelDegrees(tensor=2), ParallelDegrees(tensor=2, pipeline=2)


def test_a_survivor_and_a_spare_before_a_whole_node() -> None:
    nodes = [node("w1", held={0: 0}, degrees=TP2), node("w3", held={0: 1}, degrees=TP2), node("w4", 2)]
    assert places(wanted(tensor=2, previous="w1/0 w2/0"), nodes) == "w1/0 w3/0"


def test_rank_0_is_lost() -> None:
    nodes = [node("w2", held={0: 1}, degrees=TP2), node("w3", held={0: 0}, degrees=TP2), node("w4", 2)]
    assert places(wanted(tensor=2, previous="w1/0 w2/0"), nodes) == "w3/0 w2/0"


def test_a_surviving_stage_and_a_spare_stage_before_a_whole_node() -> None:
    survivor = node("w1", 2, held={0: 0, 1: 1}, degrees=TP2_PP2)
    spare = node("w3", 2, held={0: 3, 1: 2}, degrees=TP2_PP2)
    want = wanted(tensor=2, pipeline=2, previous="w1/0 w1/1 w2/0 w2/1")
    assert places(want, [survivor, spare, node("w4", 4)]) == "w1/0 w1/1 w3/1 w3/0"


def test_a_tensor_group_that_was_on_one_node_is_not_cut_to_save_a_load() -> None:
    survivor = node("w1", 1, held={0: 0}, degrees=TP2)
    spare = node("w3", 1, held={0: 1}, degrees=TP2)
    assert places(wanted(tensor=2, previous="w1/0 w1/1"), [survivor, spare, node("w4", 2)]) == "w4/0 w4/1"


def test_a_whole_group_of_spares_replaces_one_that_lost_a_rank() -> None:
    survivor = node("w1", 1, held={0: 0}, degrees=TP2)
    spare = node("w3", 2, held={0: 1, 1: 0}, degrees=TP2)
    assert places(wanted(tensor=2, previous="w1/0 w1/1"), [survivor, spare, node("w4", 2)]) == "w3/1 w3/0"


def test_a_spare_before_a_node_without_a_sibling() -> None:
    assert places(wanted(previous="w2/0"), [node("w1", held={0: 0}), node("w3")], {"w1": 1}) == "w1/0"


def test_shards_of_other_degrees_do_not_count() -> None:
    nodes = [node("w1", held={0: 0}, degrees=TP2), node("w3", held={0: 1}, degrees=TP2_PP2), node("w4", 2)]
    assert places(wanted(tensor=2, previous="w1/0 w2/0"), nodes) == "w4/0 w4/1"


def test_a_surviving_stage_keeps_its_number_without_a_spare() -> None:
    survivor = node("w2", 2, held={0: 2, 1: 3}, degrees=TP2_PP2)
    want = wanted(tensor=2, pipeline=2, previous="w1/0 w1/1 w2/0 w2/1")
    assert places(want, [survivor, node("w3", 2)]) == "w3/0 w3/1 w2/0 w2/1"


def test_who_has_spares_chooses_before_who_never_ran() -> None:
    fresh, missed = wanted(0), wanted(1, previous="w9/0")
    made = plan([fresh, missed], [node("w1", held={0: 0}), node("w2")], {})
    assert made[ReplicaId("m-1")].members[0].node == "w1"
    assert made[ReplicaId("m-0")].members[0].node == "w2"
