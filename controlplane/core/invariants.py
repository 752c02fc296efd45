"""What must hold of ClusterState after every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from controlplane.core.degrees import ranks_of
from controlplane.core.entities import (
    FORMING_PHASES,
    PLACED_PHASES,
    SERVING_PHASES,
    Deployment,
    Node,
    NodePhase,
    Replica,
)
from controlplane.core.places import Places
from controlplane.runtime.ids import NodeId
from controlplane.runtime.messages.common import ReplicaPhase

if TYPE_CHECKING:
    from controlplane.core.state import ClusterState


def check(state: ClusterState) -> None:
    """Assert every invariant. Looks at everything: for tests, not for each step of a real leader."""
    _check_links(state)
    _check_devices(state)
    _check_places(state)
    _check_spares(state)
    for node in state.nodes.values():
        _check_node(node)
        assert not node.untold or node.node in state.untold, f"{node.node} has told nothing and is not waited for"
    for replica in state.replicas.values():
        _check_replica(state, replica)
    for name, deployment in state.deployments.items():
        assert deployment.record.deployment == name
        _check_deployment(state, deployment)
    _check_requests(state)


def _check_links(state: ClusterState) -> None:
    for connection, link in state.links.items():
        assert link.connection == connection
        assert link.owner.link is link, f"connection {connection} is not its owner's"
    for peer in [*state.nodes.values(), *state.gateways.values()]:
        assert peer.link is None or state.links.get(peer.link.connection) is peer.link
    sessions = [link.session for link in state.links.values()]
    assert len(set(sessions)) == len(sessions), "two streams share a session"


def _check_devices(state: ClusterState) -> None:
    taken: dict[tuple[NodeId, str], Replica] = {}
    for replica in state.replicas.values():
        if replica.phase not in PLACED_PHASES:
            continue
        for member in replica.members:
            other = taken.setdefault((member.node, member.device), replica)
            assert other is replica, f"{replica.replica} and {other.replica} share {member.node}/{member.device}"


def _check_places(state: ClusterState) -> None:
    """The index says what the replicas say."""
    fresh = Places()
    for replica in state.replicas.values():
        fresh.note(replica)
    assert fresh == state.places, "the index of replicas is out of date"
    for node in state.nodes.values():
        full = len(state.places.taken(node.node)) >= len(node.devices)
        assert full or node.node in state.places.roomy, f"{node.node} has a free device that nobody would find"


def _check_spares(state: ClusterState) -> None:
    """Spares are free devices of their node, one shard each."""
    placed = {
        (member.node, member.device)
        for replica in state.replicas.values()
        if replica.phase in PLACED_PHASES
        for member in replica.members
    }
    for node in state.nodes.values():
        assert node.spares.keys() <= {device.id for device in node.devices}, f"{node.node} lacks a spare's device"
        for device, spare in node.spares.items():
            assert (node.node, device) not in placed, f"{node.node}/{device} serves and is a spare"
            assert spare.rank < ranks_of(spare.spec.degrees)
            assert spare.told or not spare.ready, f"{node.node}/{device} is ready unasked"


def _check_node(node: Node) -> None:
    assert not node.known or node.link is not None, f"{node.node} is known without a session"
    if node.phase is NodePhase.LOST:
        assert node.link is None, f"{node.node} is lost with a session"
    if node.phase is NodePhase.LIVE:
        assert node.known, f"{node.node} is live without a Snapshot"
        assert node.drain is None, f"{node.node} drains and is LIVE"


def _check_replica(state: ClusterState, replica: Replica) -> None:
    assert state.deployments[replica.deployment].replicas[replica.index] is replica
    assert replica.epoch <= state.epochs.get(replica.replica, 0), f"{replica.replica} outran its known epochs"
    assert replica.stored <= replica.epoch
    if replica.phase in PLACED_PHASES:
        assert replica.spec is not None
        assert len(replica.members) == ranks_of(replica.spec.degrees)
        assert [member.rank for member in replica.members] == list(range(len(replica.members)))
    if replica.phase in FORMING_PHASES | SERVING_PHASES:
        assert replica.stored == replica.epoch, f"{replica.replica} runs an epoch that etcd does not hold"
    if replica.phase in SERVING_PHASES:
        assert replica.capacity is not None
        lost = [name for name in replica.nodes if state.nodes[name].phase is NodePhase.LOST]
        assert not lost, f"{replica.replica} serves on lost nodes {lost}"
    else:
        assert replica.drain is None
        assert replica.adopting or not replica.load.outstanding
    assert (replica.phase is ReplicaPhase.DRAINING) == (replica.drain is not None)
    assert not replica.load.unseen.keys() - replica.load.outstanding
    replica.load.check()
    for name in replica.load.outstanding:
        permit = state.requests[name].permit
        assert permit is not None, f"{name} is outstanding and queued"
        assert (permit.replica, permit.epoch) == (replica.replica, replica.epoch)


def _check_deployment(state: ClusterState, deployment: Deployment) -> None:
    for replica in deployment.replicas.values():
        assert state.replicas.get(replica.replica) is replica
        weighed = replica.index in deployment.ladder or replica.index in deployment.unweighed
        weighed = weighed or not state.serves(replica)
        assert weighed, f"{replica.replica} serves and gets no requests"
    for name in deployment.queue:
        request = state.requests.get(name)
        assert request is not None, f"{name} is queued and unknown"
        assert request.permit is None, f"{name} is queued and assigned"
        assert request.entry.deployment == deployment.record.deployment


def _check_requests(state: ClusterState) -> None:
    for name, request in state.requests.items():
        assert request.entry.request == name
        assert state.has_journal(request) or name in state.orphans, f"nobody holds {name}, and no time runs for it"
        if request.permit is None:
            assert name in state.deployments[request.entry.deployment].queue, f"{name} waits nowhere"
        else:
            assert request.permit.attempt == request.entry.attempt
            assert request.permit.term == state.term
    new = sum(deployment.queue.new for deployment in state.deployments.values())
    assert new <= state.limits.queued_requests_max, "the bound on new requests does not hold"
