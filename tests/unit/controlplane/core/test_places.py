"""The index of replicas: by node, by device, and by what they wait for."""

from __future__ import annotations

from controlplane.core.entities import Replica
from controlplane.core.places import Places
from controlplane.runtime.ids import DeploymentId, Epoch, NodeId, ReplicaId
from controlplane.runtime.messages.common import Member, ReplicaPhase

W1, W2 = NodeId("w1"), NodeId("w2")


def placed(index: int, *places: tuple[NodeId, str], phase: ReplicaPhase = ReplicaPhase.READY) -> Replica:
    members = tuple(
        Member(rank=rank, node=node, device=device, host=node) for rank, (node, device) in enumerate(places)
    )
    name = ReplicaId(f"m-{index}")
    return Replica(name, DeploymentId("m"), index, phase, Epoch(1), Epoch(1), members=members)


def test_a_replica_is_found_by_its_nodes_and_devices() -> None:
    places, one, other = Places(), placed(0, (W1, "0"), (W2, "0")), placed(1, (W2, "1"))
    places.note(one)
    places.note(other)
    assert (places.on(W1), places.on(W2)) == ([one], [one, other])
    assert (places.taken(W1), places.taken(W2)) == ({"0"}, {"0", "1"})
    assert places.siblings == {("m", W1): 1, ("m", W2): 2}


def test_a_closed_one_holds_nothing_and_waits_where_it_ran() -> None:
    places, one = Places(), placed(0, (W1, "0"))
    places.note(one)
    one.phase = ReplicaPhase.CLOSED
    places.note(one)
    assert (places.on(W1), places.taken(W1), dict(places.siblings)) == ([one], set(), {})
    assert places.homeless == {one.replica: one}


def test_two_that_hold_one_device_let_it_go_one_by_one() -> None:
    """A new leader reads such placements from etcd: which of them is old its workers tell."""
    places, one, other = Places(), placed(0, (W1, "0")), placed(1, (W1, "0"))
    for replica in (one, other):
        replica.phase, replica.adopting = ReplicaPhase.HELD, True
        places.note(replica)
    one.adopting = False
    places.note(one)
    assert places.taken(W1) == {"0"}
    other.adopting = False
    places.note(other)
    assert places.taken(W1) == set()


def test_one_that_moved_or_is_forgotten_leaves_no_trace() -> None:
    places, one = Places(), placed(0, (W1, "0"), phase=ReplicaPhase.DEGRADED)
    places.note(one)
    assert places.given_up == {one.replica: one}
    one.phase, one.members = ReplicaPhase.PLANNED, placed(0, (W2, "1")).members
    places.note(one)
    assert (places.on(W1), places.on(W2), places.taken(W2)) == ([], [one], {"1"})
    places.forget(one)
    assert places == Places()
