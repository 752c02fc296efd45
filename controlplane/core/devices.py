"""What is free, as the leader knows it, and whether it knows it well enough to place anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import chain

from controlplane.core.entities import LeaderPhase, Node, Replica
from controlplane.core.state import ClusterState
from controlplane.core.stock import FreeDevice, FreeNode, Shard
from controlplane.runtime.ids import NodeId
from controlplane.runtime.messages.common import RankPhase


def may_place(state: ClusterState) -> bool:
    """Devices are known well enough: after grace, or once every node in etcd has told what it holds."""
    if state.phase is LeaderPhase.REBUILDING:
        return not _is_one_untold(state)
    return state.phase is LeaderPhase.LEADING


def _is_one_untold(state: ClusterState) -> bool:
    """Those that told meanwhile are dropped on the way, so that asking takes no time by the number of nodes."""
    while state.untold:
        name, _ = state.untold.popitem()
        node = state.nodes.get(name)
        if node is not None and node.untold:
            state.untold[name] = None
            return True
    return False


def free_nodes(state: ClusterState, also: Iterable[NodeId] = ()) -> list[FreeNode]:
    """Nodes that may take ranks, each with the devices that no replica holds. Those without any only if in `also`: a
    large cluster that loses a node has few others to look at."""
    names = dict.fromkeys([*_roomy(state), *also])
    nodes = [state.nodes[name] for name in names if name in state.nodes]
    return [_free_node(node, state.places.taken(node.node)) for node in nodes if node.placeable]


def _roomy(state: ClusterState) -> list[NodeId]:
    """Nodes with a device that no replica holds; those that are full meanwhile are dropped on the way."""
    for name in list(state.places.roomy):
        node = state.nodes.get(name)
        if node is None or len(state.places.taken(name)) >= len(node.devices):
            del state.places.roomy[name]
    return list(state.places.roomy)


def with_own(state: ClusterState, nodes: Sequence[FreeNode], replicas: Iterable[Replica]) -> list[FreeNode]:
    """The same nodes, as if `replicas` had given their devices back."""
    given = {node.node for node in nodes}
    own: dict[NodeId, list[FreeDevice]] = defaultdict(list)
    for member in chain.from_iterable(replica.members for replica in replicas):
        # One that was read from etcd may have been on a node that this leader never saw.
        if member.node in given:
            own[member.node].append(_free_device(state.nodes[member.node], member.device))
    return [replace(node, free=(*node.free, *own[node.node])) if node.node in own else node for node in nodes]


def _free_node(node: Node, taken: Collection[str]) -> FreeNode:
    if len(taken) >= len(node.devices):
        return FreeNode(node=node.node, host=node.address, free=())
    left = [device.id for device in node.devices if device.id not in taken and device.id not in node.sick]
    up = tuple(_free_device(node, device) for device in left if _is_up(node, device))
    return FreeNode(node=node.node, host=node.address, free=up, starting=len(left) - len(up))


def _is_up(node: Node, device: str) -> bool:
    """No rank process on it is still starting, or being started again: its daemon will say when one is there."""
    rank = node.ranks.get(device)
    return rank is None or rank.phase not in (RankPhase.STARTING, RankPhase.EXITED)


def _free_device(node: Node, device: str) -> FreeDevice:
    held = node.held.get(device)
    return FreeDevice(device=device, held=None if held is None else Shard(held.deployment, held.degrees, held.rank))
