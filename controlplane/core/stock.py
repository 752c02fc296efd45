"""What is free while a plan is made, and which node a replica prefers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from controlplane.core.degrees import ranks_of
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from controlplane.runtime.messages.common import Member, ParallelDegrees


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of a deployment's model."""

    deployment: DeploymentId
    degrees: ParallelDegrees
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeDevice:
    device: str
    # What its rank process holds already.
    held: Shard | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeNode:
    """A node that may take ranks, with its free devices."""

    node: NodeId
    host: str
    free: tuple[FreeDevice, ...]
    # Devices that will be free once their rank processes are up.
    starting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A replica that has no place."""

    replica: ReplicaId
    deployment: DeploymentId
    degrees: ParallelDegrees
    # Where it ran last.
    previous: tuple[Member, ...] = ()
    # Degrees with fewer ranks that it may be placed with if there is no other way, best first.
    smaller: tuple[ParallelDegrees, ...] = ()


Preference = tuple[int, int, int, int, str]


class Stock:
    """What is free while a plan is made. Choosing a node takes time by the logarithm of their number."""

    def __init__(self, nodes: Sequence[FreeNode], siblings: Mapping[tuple[DeploymentId, NodeId], int]) -> None:
        self.nodes = {node.node: node for node in nodes}
        self.siblings = dict(siblings)
        self.total = sum(len(node.free) for node in nodes)
        self.starting = sum(node.starting for node in nodes)
        self._devices = {(node.node, device.device) for node in nodes for device in node.free}
        self._holders: dict[Shard, list[tuple[NodeId, FreeDevice]]] = defaultdict(list)
        for node in nodes:
            for device in node.free:
                if device.held is not None:
                    self._holders[device.held].append((node.node, device))
        # Nodes by preference, as far as that does not depend on the replica; a node that changed stands there again.
        self._heaps: dict[tuple[DeploymentId, int], list[Preference]] = {}

    def can_return(self, want: Wanted) -> bool:
        """All the devices that it ran on are free."""
        return bool(want.previous) and all((member.node, member.device) in self._devices for member in want.previous)

    def holders(self, shard: Shard) -> list[tuple[NodeId, FreeDevice]]:
        """Free devices whose rank process holds the shard."""
        held = self._holders.get(shard, ())
        return [(node, device) for node, device in held if (node, device.device) in self._devices]

    def best(self, want: Wanted) -> FreeNode | None:
        """The preferred one of the nodes that hold the whole replica."""
        ranks = ranks_of(want.degrees)
        names = {member.node for member in want.previous} & self.nodes.keys()
        top = self._top(want.deployment, ranks)
        if top is not None:
            names.add(top)
        fitting = [self.nodes[name] for name in names if len(self.nodes[name].free) >= ranks]
        return min(fitting, key=lambda node: self.preference(want, node), default=None)

    def preference(self, want: Wanted, node: FreeNode) -> Preference:
        """Fewest siblings first (a node's death then takes fewest replicas), then most ranks that need not load again,
        then the node it had, then the tightest fit."""
        had = sum(member.node == node.node for member in want.previous)
        return _standing(want.deployment, ranks_of(want.degrees), had, node, self.siblings)

    def take(self, deployment: DeploymentId, members: Sequence[Member]) -> None:
        """These devices are not free any more."""
        self.total -= len(members)
        self._devices -= {(member.node, member.device) for member in members}
        for name in {member.node for member in members}:
            taken = {member.device for member in members if member.node == name}
            self.nodes[name] = _without(self.nodes[name], taken)
            self.siblings[deployment, name] = self.siblings.get((deployment, name), 0) + 1
            for (other, ranks), heap in self._heaps.items():
                heappush(heap, self._standing(other, ranks, self.nodes[name]))

    def _top(self, deployment: DeploymentId, ranks: int) -> NodeId | None:
        heap = self._heaps.get((deployment, ranks))
        if heap is None:
            fitting = (node for node in self.nodes.values() if len(node.free) >= ranks)
            heap = [self._standing(deployment, ranks, node) for node in fitting]
            heapify(heap)
            self._heaps[deployment, ranks] = heap
        while heap:
            node = self.nodes[NodeId(heap[0][-1])]
            if len(node.free) >= ranks and heap[0] == self._standing(deployment, ranks, node):
                return node.node
            heappop(heap)
        return None

    def _standing(self, deployment: DeploymentId, ranks: int, node: FreeNode) -> Preference:
        return _standing(deployment, ranks, 0, node, self.siblings)


def _without(node: FreeNode, taken: set[str]) -> FreeNode:
    return FreeNode(
        node=node.node, host=node.host, free=tuple(device for device in node.free if device.device not in taken)
    )


def _standing(
    deployment: DeploymentId,
    ranks: int,
    had: int,
    node: FreeNode,
    siblings: Mapping[tuple[DeploymentId, NodeId], int],
) -> Preference:
    warm = sum(device.held is not None and device.held.deployment == deployment for device in node.free)
    return siblings.get((deployment, node.node), 0), -min(warm, ranks), -had, len(node.free), node.node
