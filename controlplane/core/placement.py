"""Where a replica's ranks go: a pure plan from what is free, with its reason.

One replica takes tensor × pipeline ranks; experts lie across the same ranks. Rank 0 first, tensor axis fastest. A
tensor group talks in every layer, so it stays on one node wherever it can. As many replicas as can be get their full
degrees; only what is left then goes to those that may be shrunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

from controlplane.core.degrees import named, ranks_of
from controlplane.core.stock import FreeDevice, FreeNode, Shard, Stock, Wanted
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from controlplane.runtime.messages.common import Member, ParallelDegrees, Reason, ReasonKind


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

    `siblings` counts the replicas of a deployment that a node runs already. Replicas whose former devices are all free,
    or whose weights are all there, choose first, so that no other takes a place that saves one of them a load.
    """
    stock = Stock(nodes, siblings)
    plans: dict[ReplicaId, Plan] = {}
    for want in sorted(wanted, key=lambda want: not stock.can_return(want) and _where_held(want, stock) is None):
        plans[want.replica] = made = _plan_one(want, stock)
        stock.take(want.deployment, made.members)
    for want in wanted:
        if not plans[want.replica].members and (made := _plan_smaller(want, stock)) is not None:
            plans[want.replica] = made
            stock.take(want.deployment, made.members)
    return plans


def _plan_one(want: Wanted, stock: Stock) -> Plan:
    if stock.total >= ranks_of(want.degrees):
        for way in _WAYS:
            if (made := _try(want, stock, way)) is not None:
                return made
    return Plan(members=(), reason=_no_place(want, stock), degrees=want.degrees)


def _try(want: Wanted, stock: Stock, way: _Way) -> Plan | None:
    slots = way.slots(want, stock)
    if slots is None:
        return None
    reason = Reason(kind=ReasonKind.REPLACED, text=f"{_devices(ranks_of(want.degrees))} free {way.shape}")
    return Plan(members=_members(want, slots), reason=reason, degrees=want.degrees)


def _plan_smaller(want: Wanted, stock: Stock) -> Plan | None:
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


def _shrunk(want: Wanted, made: Plan, stock: Stock, shape: str) -> Reason:
    text = f"shrunk from {named(want.degrees)} to {named(made.degrees)} {shape}: "
    text += f"{_devices(stock.total)} free, {ranks_of(want.degrees)} needed"
    return Reason(kind=ReasonKind.REPLACED, text=text + _missing(want, stock))


def _no_place(want: Wanted, stock: Stock) -> Reason:
    text = f"{want.replica} needs {_devices(ranks_of(want.degrees))}, {stock.total} free"
    if stock.starting:
        text += f", {stock.starting} starting"
    return Reason(kind=ReasonKind.NO_CAPACITY, text=text + _missing(want, stock))


def _missing(want: Wanted, stock: Stock) -> str:
    missing = sorted({member.node for member in want.previous} - stock.nodes.keys())
    return f"; waits for {', '.join(missing)} to come back" if missing else ""


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count != 1)}"


_Slots = list[tuple[FreeNode, FreeDevice]]


def _on_one_node(want: Wanted, stock: Stock) -> _Slots | None:
    node = stock.best(want)
    return None if node is None else _fill(want, node, range(ranks_of(want.degrees)))


def _where_held(want: Wanted, stock: Stock) -> _Slots | None:
    """Nothing to load: what survived of a replica stays, and spares take the place of the rest."""
    if not want.previous:
        return None
    slots: _Slots = []
    for ranks in _groups(want):
        held = _held_group(want, stock, ranks)
        if held is None:
            return None
        slots.extend(held)
    return slots


def _held_group(want: Wanted, stock: Stock, ranks: range) -> _Slots | None:
    """A tensor group that was on one node is not cut to save a load: that would slow every later step."""
    held = {rank: stock.holders(Shard(want.deployment, want.degrees, rank)) for rank in ranks}
    homes = {node for node, _ in held[ranks[0]]}
    for holders in held.values():
        homes &= {node for node, _ in holders}
    if homes:
        home = min(homes, key=lambda name: stock.preference(want, stock.nodes[name]))
        held = {rank: [holder for holder in holders if holder[0] == home] for rank, holders in held.items()}
    elif not all(held.values()) or not _was_cut(want, ranks):
        return None
    best = [min(held[rank], key=lambda holder: (not _was_rank(want, *holder, rank), holder[0])) for rank in ranks]
    return [(stock.nodes[node], device) for node, device in best]


def _was_cut(want: Wanted, ranks: range) -> bool:
    return len({member.node for member in want.previous if member.rank in ranks}) > 1


def _groups(want: Wanted) -> list[range]:
    """Ranks by tensor group."""
    tensor = want.degrees.tensor
    return [range(first, first + tensor) for first in range(0, ranks_of(want.degrees), tensor)]


def _by_groups(want: Wanted, stock: Stock) -> _Slots | None:
    """Whole tensor groups a node, over as few nodes as that takes."""
    return _deal(want, stock, _groups(want))


def _anywhere(want: Wanted, stock: Stock) -> _Slots | None:
    """A tensor group cut by a node's edge: slow, but better than not serving."""
    return _deal(want, stock, [range(rank, rank + 1) for rank in range(ranks_of(want.degrees))])


def _deal(want: Wanted, stock: Stock, groups: Sequence[range]) -> _Slots | None:
    """Deal equal groups of ranks to nodes, as few as that takes; each to the one that holds most of it already."""
    size, left = len(groups[0]), len(groups)
    room: dict[NodeId, int] = {}
    ordered = sorted(stock.nodes.values(), key=lambda node: stock.preference(want, node))
    for node in sorted(ordered, key=lambda node: -(len(node.free) // size)):
        if take := min(len(node.free) // size, left):
            room[node.node] = take
            left -= take
    if left:
        return None
    slots: dict[int, tuple[FreeNode, FreeDevice]] = {}
    for name, ranks in _dealt(want, stock, groups, room).items():
        slots.update(zip(ranks, _fill(want, stock.nodes[name], ranks), strict=True))
    return [slots[rank] for rank in sorted(slots)]


def _dealt(want: Wanted, stock: Stock, groups: Sequence[range], room: dict[NodeId, int]) -> dict[NodeId, list[int]]:
    """Ranks by node; `room`: how many groups each node takes."""
    kept = sorted(
        (-count, index, name)
        for index, ranks in enumerate(groups)
        for name in room
        if (count := _kept(want, stock.nodes[name], ranks))
    )
    dealt: dict[NodeId, list[int]] = {name: [] for name in room}
    waiting = dict(enumerate(groups))
    in_order = ((0, index, name) for index in range(len(groups)) for name in room)
    for _, index, name in [*kept, *in_order]:
        if index in waiting and room[name]:
            dealt[name].extend(waiting.pop(index))
            room[name] -= 1
    return dealt


def _kept(want: Wanted, node: FreeNode, ranks: range) -> int:
    """Ranks that would find their weights, or at least their former device, on the node."""
    return sum(
        any(_holds_rank(want, node.node, device, rank) or _was_rank(want, node.node, device, rank) for rank in ranks)
        for device in node.free
    )


@dataclass(frozen=True, slots=True)
class _Way:
    shape: str
    slots: Callable[[Wanted, Stock], _Slots | None]


_WAYS = (
    _Way("with its weights", _where_held),
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
    return device.held == Shard(want.deployment, want.degrees, rank)


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
