"""What ranks hold of models, and from whom others may copy it."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.core.entities import Node, is_session_live
from controlplane.core.state import ClusterState
from controlplane.core.stock import Shard
from controlplane.runtime.ids import DeploymentId, NodeId
from controlplane.runtime.messages.weights import HeldWeights, WeightSource, WeightsState

SOURCES_MAX = 64
"""Living ranks that a loading one is told of."""

Place = tuple[NodeId, str]


def told(state: ClusterState, node: Node, said: WeightsState) -> None:
    """A device's rank process holds something else now."""
    if said.held is None:
        node.held.pop(said.device, None)
    else:
        node.held[said.device] = said.held
        note(state, node)
    state.replan = True


def note(state: ClusterState, node: Node) -> None:
    """The node's ranks hold something: whoever looks for it looks there."""
    for held in node.held.values():
        state.holders.setdefault(held.deployment, {})[node.node] = None


def forget(state: ClusterState, deployment: DeploymentId) -> None:
    """Other weights are wanted under this name: what ranks hold is of no use."""
    for node in state.nodes.values():
        node.held = {device: held for device, held in node.held.items() if held.deployment != deployment}


def shard_of(held: HeldWeights) -> Shard:
    return Shard(held.deployment, held.degrees, held.rank)


def sources(state: ClusterState, deployment: DeploymentId, besides: frozenset[Place]) -> tuple[WeightSource, ...]:
    """Living ranks that hold weights of the deployment, whatever their degrees; none on `besides`.

    The search begins at a node by chance, so that not everybody asks the same ones. Whether what a rank holds is still
    the content wanted is between the two ranks.
    """
    holders = state.holders.get(deployment, {})
    names = list(holders)
    start = state.rng.randrange(len(names)) if names else 0
    found: list[WeightSource] = []
    for name in [*names[start:], *names[:start]]:
        node = state.nodes.get(name)
        if node is None or not any(held.deployment == deployment for held in node.held.values()):
            del holders[name]
        elif is_session_live(node):
            found.extend(_at(node, deployment, besides))
        if len(found) >= SOURCES_MAX:
            break
    return tuple(sorted(found[:SOURCES_MAX], key=lambda source: source.address))


def _at(node: Node, deployment: DeploymentId, besides: frozenset[Place]) -> Iterator[WeightSource]:
    for device, held in node.held.items():
        if held.deployment == deployment and held.address and (node.node, device) not in besides:
            yield WeightSource(degrees=held.degrees, rank=held.rank, address=held.address)
