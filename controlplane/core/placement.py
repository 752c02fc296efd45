"""Where a replica's ranks go: a pure plan from what is free, with its reason.

One replica takes tensor × pipeline ranks; experts lie across the same ranks. Rank 0 first, tensor axis fastest. A
tensor group talks in every layer, so it stays on one node wherever it can. As many replicas as can be get their full
degrees; only what is left then goes to those that may be shrunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import groupby, product

from controlplane.core.degrees import named, ranks_of
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from controlplane.runtime.messages.common import Member, ParallelDegrees, Reason, ReasonKind


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeDevice:
    device: str
    # Whose weights its rank process holds already: deployment and rank number.
    held: tuple[DeploymentId, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeNode:
    """A node that may take ranks, with its free devices."""

    node: NodeId
    host: str
    free: tuple[FreeDevice, ...]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Members in rank order; empty: no place now. The reason says why in both cases."""

    members: tuple[Member, ...]
    reason: Reason
    # Of `members`; the wanted ones, or smaller.
    degrees: ParallelDegrees


def plan(
    wanted: Sequence[Wanted], nodes: Sequence[FreeNode], siblings: Mapping[tuple[DeploymentId, NodeId], int]
) -> dict[ReplicaId, Plan]:
    """A plan for every wanted replica, none sharing a device.

    `siblings` counts the replicas of a deployment that a node runs already. Replicas whose former devices are all free
    choose first, so that no other takes a place that saves one of them a load.
    """
    stock = _Stock(nodes, siblings)
    plans: dict[ReplicaId, Plan] = {}
    for want in sorted(wanted, key=lambda want: not stock.can_return(want)):
        plans[want.replica] = made = _plan_one(want, stock)
        stock.take(want.deployment, made.members)
    for want in wanted:
        if not plans[want.replica].members and (made := _plan_smaller(want, stock)) is not None:
            plans[want.replica] = made
            stock.take(want.deployment, made.members)
    return plans


class _Stock:
    """What is free while a plan is made. Choosing a node takes time by the logarithm of their number."""

    def __init__(self, nodes: Sequence[FreeNode], siblings: Mapping[tuple[DeploymentId, NodeId], int]) -> None:
        self.nodes = {node.node: node for node in nodes}
        self.siblings = dict(siblings)
        self.total = sum(len(node.free) for node in nodes)
        self._devices = {(node.node, device.device) for node in nodes for device in node.free}
        # Nodes by preference, as far as that does not depend on the replica; a node that changed stands there again.
        self._heaps: dict[tuple[DeploymentId, int], list[_Preference]] = {}

    def can_return(self, want: Wanted) -> bool:
        """All the devices that it ran on are free."""
        return bool(want.previous) and all((member.node, member.device) in self._devices for member in want.previous)

    def best(self, want: Wanted) -> FreeNode | None:
        """The preferred one of the nodes that hold the whole replica."""
        ranks = ranks_of(want.degrees)
        names = {member.node for member in want.previous} & self.nodes.keys()
        top = self._top(want.deployment, ranks)
        if top is not None:
            names.add(top)
        fitting = [self.nodes[name] for name in names if len(self.nodes[name].free) >= ranks]
        return min(fitting, key=lambda node: _preference(want, node, self.siblings), default=None)

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

    def _standing(self, deployment: DeploymentId, ranks: int, node: FreeNode) -> _Preference:
        return _standing(deployment, ranks, 0, node, self.siblings)


def _without(node: FreeNode, taken: set[str]) -> FreeNode:
    return FreeNode(
        node=node.node, host=node.host, free=tuple(device for device in node.free if device.device not in taken)
    )


def _plan_one(want: Wanted, stock: _Stock) -> Plan:
    if stock.total >= ranks_of(want.degrees):
        for way in _WAYS:
            if (made := _try(want, stock, way)) is not None:
                return made
    return Plan(members=(), reason=_no_place(want, stock), degrees=want.degrees)


def _try(want: Wanted, stock: _Stock, way: _Way) -> Plan | None:
    slots = way.slots(want, stock)
    if slots is None:
        return None
    reason = Reason(kind=ReasonKind.REPLACED, text=f"{_devices(ranks_of(want.degrees))} free {way.shape}")
    return Plan(members=_members(want, slots), reason=reason, degrees=want.degrees)


def _plan_smaller(want: Wanted, stock: _Stock) -> Plan | None:
    """As many ranks as there are devices for; among equals tensor groups that stay on one node, then the largest."""
    for ranks, equals in groupby(want.smaller, ranks_of):
        shrunk = [replace(want, degrees=degrees) for degrees in equals]
        if ranks > stock.total:
            continue
        for ways in (_WAYS[:-1], _WAYS[-1:]):
            for one, way in product(shrunk, ways):
                if (made := _try(one, stock, way)) is not None:
                    return replace(made, reason=_shrunk(want, made, stock, way.shape))
    return None


def _shrunk(want: Wanted, made: Plan, stock: _Stock, shape: str) -> Reason:
    text = f"shrunk from {named(want.degrees)} to {named(made.degrees)} {shape}: "
    text += f"{_devices(stock.total)} free, {ranks_of(want.degrees)} needed"
    return Reason(kind=ReasonKind.REPLACED, text=text + _missing(want, stock))


def _no_place(want: Wanted, stock: _Stock) -> Reason:
    text = f"{want.replica} needs {_devices(ranks_of(want.degrees))}, {stock.total} free"
    return Reason(kind=ReasonKind.NO_CAPACITY, text=text + _missing(want, stock))


def _missing(want: Wanted, stock: _Stock) -> str:
    missing = sorted({member.node for member in want.previous} - stock.nodes.keys())
    return f"; waits for {', '.join(missing)} to come back" if missing else ""


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count != 1)}"


_Preference = tuple[int, int, int, int, str]


def _preference(want: Wanted, node: FreeNode, siblings: Mapping[tuple[DeploymentId, NodeId], int]) -> _Preference:
    """Fewest siblings first (a node's death then takes fewest replicas), then most ranks that need not load again, then
    the node it had, then the tightest fit."""
    had = sum(member.node == node.node for member in want.previous)
    return _standing(want.deployment, ranks_of(want.degrees), had, node, siblings)


def _standing(
    deployment: DeploymentId,
    ranks: int,
    had: int,
    node: FreeNode,
    siblings: Mapping[tuple[DeploymentId, NodeId], int],
) -> _Preference:
    warm = sum(device.held is not None and device.held[0] == deployment for device in node.free)
    return siblings.get((deployment, node.node), 0), -min(warm, ranks), -had, len(node.free), node.node


_Slots = list[tuple[FreeNode, FreeDevice]]


def _on_one_node(want: Wanted, stock: _Stock) -> _Slots | None:
    node = stock.best(want)
    return None if node is None else _fill(want, node, range(ranks_of(want.degrees)))


def _ordered(want: Wanted, stock: _Stock) -> list[FreeNode]:
    return sorted(stock.nodes.values(), key=lambda node: _preference(want, node, stock.siblings))


def _by_groups(want: Wanted, stock: _Stock) -> _Slots | None:
    """Whole tensor groups a node, over as few nodes as that takes."""
    tensor, stages = want.degrees.tensor, want.degrees.pipeline
    slots: _Slots = []
    for node in sorted(_ordered(want, stock), key=lambda node: -(len(node.free) // tensor)):
        first = len(slots)
        take = min(len(node.free) // tensor * tensor, stages * tensor - first)
        slots.extend(_fill(want, node, range(first, first + take)))
    return slots if len(slots) == stages * tensor else None


def _anywhere(want: Wanted, stock: _Stock) -> _Slots | None:
    """A tensor group cut by a node's edge: slow, but better than not serving."""
    ranks = ranks_of(want.degrees)
    slots: _Slots = []
    for node in sorted(_ordered(want, stock), key=lambda node: -len(node.free)):
        first = len(slots)
        slots.extend(_fill(want, node, range(first, first + min(len(node.free), ranks - first))))
    return slots if len(slots) == ranks else None


@dataclass(frozen=True, slots=True)
class _Way:
    shape: str
    slots: Callable[[Wanted, _Stock], _Slots | None]


_WAYS = (
    _Way("on one node", _on_one_node),
    _Way("by whole tensor groups", _by_groups),
    _Way("across nodes", _anywhere),
)


def _fill(want: Wanted, node: FreeNode, ranks: Iterable[int]) -> _Slots:
    """A device of `node` for each rank: the one that holds that rank's weights, else any, in the node's order."""
    wanted = list(ranks)
    spare = list(node.free)
    chosen: dict[int, FreeDevice] = {}
    for fits in (_holds_rank, _was_rank, _holds_nothing, _any_device):
        for rank in wanted:
            if rank in chosen:
                continue
            device = next((device for device in spare if fits(want, node.node, device, rank)), None)
            if device is not None:
                chosen[rank] = device
                spare.remove(device)
    return [(node, chosen[rank]) for rank in wanted]


def _holds_rank(want: Wanted, node: NodeId, device: FreeDevice, rank: int) -> bool:
    return device.held == (want.deployment, rank)


def _was_rank(want: Wanted, node: NodeId, device: FreeDevice, rank: int) -> bool:
    return any(
        member.node == node and member.device == device.device and member.rank == rank for member in want.previous
    )


def _holds_nothing(want: Wanted, node: NodeId, device: FreeDevice, rank: int) -> bool:
    return device.held is None


def _any_device(want: Wanted, node: NodeId, device: FreeDevice, rank: int) -> bool:
    return True


def _members(want: Wanted, slots: _Slots) -> tuple[Member, ...]:
    return tuple(
        Member(rank=rank, node=node.node, device=device.device, host=node.host)
        for rank, (node, device) in enumerate(slots)
    )
