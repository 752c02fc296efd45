"""Where a replica's ranks go: a pure plan from what is free, with its reason.

One replica takes tensor × pipeline ranks; experts lie across the same ranks. Rank 0 first, tensor axis fastest. A
tensor group talks in every layer, so it stays on one node wherever it can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Members in rank order; empty: no place now. The reason says why in both cases."""

    members: tuple[Member, ...]
    reason: Reason


def ranks_of(degrees: ParallelDegrees) -> int:
    """Ranks of one replica."""
    return degrees.tensor * degrees.pipeline


def plan(
    wanted: Sequence[Wanted], nodes: Sequence[FreeNode], siblings: Mapping[tuple[DeploymentId, NodeId], int]
) -> dict[ReplicaId, Plan]:
    """A plan for every wanted replica, none sharing a device.

    `siblings` counts the replicas of a deployment that a node runs already. Replicas whose former devices are all free
    choose first, so that no other takes a place that saves one of them a load.
    """
    free = {node.node: node for node in nodes}
    counts = dict(siblings)
    plans: dict[ReplicaId, Plan] = {}
    for want in sorted(wanted, key=lambda want: not _can_return(want, free)):
        made = _plan_one(want, list(free.values()), counts)
        plans[want.replica] = made
        for node in {member.node for member in made.members}:
            taken = {member.device for member in made.members if member.node == node}
            free[node] = _without(free[node], taken)
            counts[want.deployment, node] = counts.get((want.deployment, node), 0) + 1
    return plans


def _can_return(want: Wanted, free: Mapping[NodeId, FreeNode]) -> bool:
    if not want.previous:
        return False
    devices = {(node.node, device.device) for node in free.values() for device in node.free}
    return all((member.node, member.device) in devices for member in want.previous)


def _without(node: FreeNode, taken: set[str]) -> FreeNode:
    return FreeNode(
        node=node.node, host=node.host, free=tuple(device for device in node.free if device.device not in taken)
    )


def _plan_one(want: Wanted, nodes: Sequence[FreeNode], siblings: Mapping[tuple[DeploymentId, NodeId], int]) -> Plan:
    ranks = ranks_of(want.degrees)
    ordered = sorted(nodes, key=lambda node: _preference(want, node, siblings))
    ways = (("on one node", _on_one_node), ("by whole tensor groups", _by_groups), ("across nodes", _anywhere))
    for shape, groups in ways:
        slots = groups(want, ordered)
        if slots is not None:
            reason = Reason(kind=ReasonKind.REPLACED, text=f"{_devices(ranks)} free {shape}")
            return Plan(members=_members(want, slots), reason=reason)
    return Plan(members=(), reason=_no_place(want, nodes))


def _no_place(want: Wanted, nodes: Sequence[FreeNode]) -> Reason:
    ranks = ranks_of(want.degrees)
    free = sum(len(node.free) for node in nodes)
    present = {node.node for node in nodes}
    missing = sorted({member.node for member in want.previous} - present)
    text = f"{want.replica} needs {_devices(ranks)}, {free} free"
    if missing:
        text += f"; waits for {', '.join(missing)} to come back"
    return Reason(kind=ReasonKind.NO_CAPACITY, text=text)


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count != 1)}"


def _preference(
    want: Wanted, node: FreeNode, siblings: Mapping[tuple[DeploymentId, NodeId], int]
) -> tuple[int, int, int, int, str]:
    """Fewest siblings first (a node's death then takes fewest replicas), then most ranks that need not load again, then
    the node it had, then the tightest fit."""
    warm = sum(device.held is not None and device.held[0] == want.deployment for device in node.free)
    had = sum(member.node == node.node for member in want.previous)
    return (
        siblings.get((want.deployment, node.node), 0),
        -min(warm, ranks_of(want.degrees)),
        -had,
        len(node.free),
        node.node,
    )


_Slots = list[tuple[FreeNode, FreeDevice]]


def _on_one_node(want: Wanted, nodes: Sequence[FreeNode]) -> _Slots | None:
    ranks = ranks_of(want.degrees)
    for node in nodes:
        if len(node.free) >= ranks:
            return _fill(want, node, range(ranks))
    return None


def _by_groups(want: Wanted, nodes: Sequence[FreeNode]) -> _Slots | None:
    """Whole tensor groups a node, over as few nodes as that takes."""
    tensor, stages = want.degrees.tensor, want.degrees.pipeline
    slots: _Slots = []
    for node in sorted(nodes, key=lambda node: -(len(node.free) // tensor)):
        first = len(slots)
        take = min(len(node.free) // tensor * tensor, stages * tensor - first)
        slots.extend(_fill(want, node, range(first, first + take)))
    return slots if len(slots) == stages * tensor else None


def _anywhere(want: Wanted, nodes: Sequence[FreeNode]) -> _Slots | None:
    """A tensor group cut by a node's edge: slow, but better than not serving."""
    ranks = ranks_of(want.degrees)
    slots: _Slots = []
    for node in sorted(nodes, key=lambda node: -len(node.free)):
        first = len(slots)
        slots.extend(_fill(want, node, range(first, first + min(len(node.free), ranks - first))))
    return slots if len(slots) == ranks else None


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
