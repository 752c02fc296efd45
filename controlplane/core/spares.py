"""Hot spares: free devices that keep shards ready, so that a replica which loses ranks has nothing to load.

A spare is a free device like any other: whoever has no place may take it. What it keeps is chosen by covering.py while
all replicas serve; while one does not, spares stay as they are, for they are about to be needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from controlplane.core.covering import Choice, Loss, Spot, choose
from controlplane.core.devices import free_nodes, may_place
from controlplane.core.entities import SERVING_PHASES, Deployment, Node, Spare
from controlplane.core.state import ClusterState
from controlplane.core.stock import Shard
from controlplane.core.weights import shard_of, sources
from controlplane.runtime.ids import NodeId
from controlplane.runtime.messages.common import Reason, ReplicaSpec
from controlplane.runtime.messages.weights import PreloadWeights, WeightsState

SPARES_MAX = 64
"""Of one deployment."""

Place = tuple[NodeId, str]


def settle(state: ClusterState) -> None:
    """Make the spares those that are wanted now, and tell them what to load."""
    wanting = [one for one in state.deployments.values() if one.record.spares and not one.removed]
    if not (wanting or state.spared) or not may_place(state):
        return
    free = {(node.node, device.device): device.held for node in free_nodes(state) for device in node.free}
    wanted: dict[Place, Spare] = {}
    for deployment in wanting:
        wanted |= _wanted(state, deployment, {place: held for place, held in free.items() if place not in wanted})
    state.spared = bool(wanted)
    for node in state.nodes.values():
        node.spares = {device: spare for (name, device), spare in wanted.items() if name == node.node}
        for device, spare in node.spares.items():
            if not spare.told and spare.retry_s <= 0 and node.known:
                _tell(state, node, device, spare)


def _wanted(state: ClusterState, deployment: Deployment, free: Mapping[Place, Shard | None]) -> dict[Place, Spare]:
    spec = deployment.record.spec
    current = {place: spare for place, spare in _spares(state) if place in free and spare.spec == spec}
    losses = list(_losses(deployment))
    placed = [replica for replica in deployment.replicas.values() if not replica.retiring]
    if not losses or any(replica.phase not in SERVING_PHASES for replica in placed):
        return dict(list(current.items())[: deployment.record.spares])
    spots = [
        _spot(spec, place, held, current.get(place), state.nodes[place[0]].failed_preloads[place[1]])
        for place, held in free.items()
    ]
    facts = (deployment.record.spares, tuple(losses), tuple(spots), tuple(current))
    if facts == deployment.covered:
        return current
    chosen = choose(losses, spots, deployment.record.spares)
    if chosen.keys() == current.keys() and all(current[place].rank == one.rank for place, one in chosen.items()):
        # Asked again until nothing changes: what was chosen may be gone, and all else be as it was then.
        deployment.covered = facts
    return {place: _spare(state, place, choice, spec, current.get(place)) for place, choice in chosen.items()}


def _spares(state: ClusterState) -> Iterator[tuple[Place, Spare]]:
    for node in state.nodes.values():
        for device, spare in node.spares.items():
            yield (node.node, device), spare


def _losses(deployment: Deployment) -> Iterator[Loss]:
    """What may be lost of replicas at full size; a shrunk one has no use for a spare."""
    for replica in deployment.replicas.values():
        if replica.phase in SERVING_PHASES and replica.spec == deployment.record.spec and not replica.retiring:
            for node in replica.nodes:
                ranks = tuple(member.rank for member in replica.members if member.node == node)
                yield Loss(replica.replica, node, ranks)


def _spot(spec: ReplicaSpec, place: Place, held: Shard | None, current: Spare | None, failures: int) -> Spot:
    fits = held is not None and (held.deployment, held.degrees) == (spec.deployment, spec.degrees)
    rank = held.rank if held is not None and fits else None
    return Spot(*place, rank if current is None else current.rank, failures)


def _spare(state: ClusterState, place: Place, choice: Choice, spec: ReplicaSpec, current: Spare | None) -> Spare:
    if current is not None and current.rank == choice.rank:
        current.reason = choice.reason
        return current
    details = {"device": place[1], "deployment": spec.deployment}
    state.record("spare_assigned", node=place[0], reason=choice.reason, details=details)
    failures = state.nodes[place[0]].failed_preloads[place[1]]
    return Spare(spec, choice.rank, choice.reason, retry_s=_backoff_s(state, failures))


def _tell(state: ClusterState, node: Node, device: str, spare: Spare) -> None:
    spare.told = True
    others = sources(state, spare.spec.deployment, frozenset({(node.node, device)}))
    state.send_worker(node, PreloadWeights(device=device, rank=spare.rank, spec=spare.spec, sources=others))


# ---------------------------------------------------------------- what they answer


def answered(state: ClusterState, node: Node, said: WeightsState) -> None:
    """What the device holds has changed: the spare is ready, or its preload failed."""
    spare = node.spares.get(said.device)
    if spare is None or not spare.told:
        return
    details = {"device": said.device, "deployment": spare.spec.deployment}
    if said.held is not None and shard_of(said.held) == Shard(spare.spec.deployment, spare.spec.degrees, spare.rank):
        node.failed_preloads.pop(said.device, None)
        if not spare.ready:
            spare.ready = True
            state.record("spare_loaded", node=node.node, reason=spare.reason, details=details)
        return
    spare.ready = False
    if said.reason is not None:
        _failed(state, node, said.device, said.reason)


def exited(state: ClusterState, node: Node, device: str, reason: Reason) -> None:
    """A spare's process is gone, and what it held with it."""
    spare = node.spares.get(device)
    if spare is not None and spare.told and not spare.ready:
        _failed(state, node, device, reason)
    elif spare is not None:
        spare.told = spare.ready = False


def begin_session(node: Node) -> None:
    """Nothing carries over: each is told again."""
    for spare in node.spares.values():
        spare.told = spare.ready = False


def tick(state: ClusterState, passed_s: float) -> None:
    for _, spare in _spares(state):
        spare.retry_s = max(0.0, spare.retry_s - passed_s)


def _failed(state: ClusterState, node: Node, device: str, reason: Reason) -> None:
    spare = node.spares[device]
    spare.told = spare.ready = False
    node.failed_preloads[device] += 1
    spare.retry_s = _backoff_s(state, node.failed_preloads[device])
    details = {"device": device, "deployment": spare.spec.deployment, "failures": str(node.failed_preloads[device])}
    state.record("spare_failed", node=node.node, reason=reason, details=details)


def _backoff_s(state: ClusterState, failures: int) -> float:
    """A stage, two, four, …: nobody waits for a spare, and a full disk stays full for long."""
    return min(state.timings.regroup_window, state.timings.stage * 2 ** (failures - 1)) if failures else 0.0
