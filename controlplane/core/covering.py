"""Which shards spare devices keep ready: a pure choice, each with its reason.

What dies together is replaced together: a node's death takes all ranks of a replica that it runs, so spares cover
those whole, on other nodes than that. Once every loss is covered, further spares cover them again, the least covered
first. The choice is stable: what a device holds, or was told to load, is chosen again while it is of use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controlplane.runtime.ids import NodeId, ReplicaId
from controlplane.runtime.messages.common import Reason, ReasonKind


@dataclass(frozen=True, slots=True)
class Loss:
    """What a node's death takes of a replica."""

    replica: ReplicaId
    node: NodeId
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Spot:
    """A free device that may be a spare."""

    node: NodeId
    device: str
    # The rank whose shard it holds, or was told to load; None: of no use.
    rank: int | None = None
    # Preloads that failed there in a row.
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    rank: int
    reason: Reason


def choose(losses: Sequence[Loss], spots: Sequence[Spot], count: int) -> Mapping[tuple[NodeId, str], Choice]:
    """A shard for up to `count` spots."""
    ledger = _Ledger(spots, min(count, len(spots)))
    covered: Counter[Loss] = Counter()
    while losses and ledger.left:
        loss = min(losses, key=lambda loss: _urgency(loss, covered[loss], ledger))
        covered[loss] += 1
        ledger.cover(loss, covered[loss])
    return ledger.chosen


_Urgency = tuple[int, bool, int, ReplicaId, NodeId]


def _urgency(loss: Loss, times: int, ledger: _Ledger) -> _Urgency:
    """Least covered first, then what can be covered whole, then what mostly is already."""
    held = sum(any(spot.rank == rank for spot in ledger.away(loss)) for rank in loss.ranks)
    return times, len(loss.ranks) > ledger.left, -held, loss.replica, loss.node


class _Ledger:
    """Spots that are still to be had, and what was chosen."""

    def __init__(self, spots: Sequence[Spot], left: int) -> None:
        self.left = left
        self.chosen: dict[tuple[NodeId, str], Choice] = {}
        self._spots = list(spots)
        # Chosen spots by rank.
        self._copies: dict[int, list[NodeId]] = {}

    def away(self, loss: Loss) -> list[Spot]:
        """Spots that the loss leaves."""
        return [spot for spot in self._spots if spot.node != loss.node]

    def cover(self, loss: Loss, times: int) -> None:
        """Have `times` copies of each of its ranks, away from its node if there is a spot."""
        copies = {rank: [node for node in self._copies.get(rank, ()) if node != loss.node] for rank in loss.ranks}
        missing = [rank for rank in loss.ranks if len(copies[rank]) < times]
        held = {spot.rank for spot in self.away(loss)}
        missing.sort(key=lambda rank: (len(copies[rank]), rank not in held, rank))
        chosen = missing[: self.left]
        for rank in sorted(chosen):
            self._take(rank, loss, chosen)

    def _take(self, rank: int, loss: Loss, group: Sequence[int]) -> None:
        """The group stays on one node where it can, best where most of it is held."""
        useful = Counter(spot.node for spot in self._spots if spot.rank in group)
        free = Counter(spot.node for spot in self._spots)
        taken = Counter(node for other in group for node in self._copies.get(other, ()))

        def order(spot: Spot) -> tuple[object, ...]:
            room = min(free[spot.node] + taken[spot.node], len(group))
            other = spot.rank in group and spot.rank != rank
            near = spot.node == loss.node
            return near, spot.failures, spot.rank != rank, other, -useful[spot.node], -room, spot.node, spot.device

        spot = min(self._spots, key=order)
        self._spots.remove(spot)
        self.left -= 1
        self._copies.setdefault(rank, []).append(spot.node)
        self.chosen[spot.node, spot.device] = Choice(rank, _reason(rank, loss, near=spot.node == loss.node))


def _reason(rank: int, loss: Loss, *, near: bool) -> Reason:
    if near:
        text = f"rank {rank} of {loss.replica} on its own node {loss.node}: no other has a free device"
    else:
        text = f"rank {rank} of {loss.replica} would be lost with {loss.node}"
    return Reason(kind=ReasonKind.REPLACED, text=text, node=loss.node, group=loss.replica)
