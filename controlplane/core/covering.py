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
    times, waiting = 0, list[Loss]()
    while losses and ledger.left:
        waiting = [loss for loss in waiting if ledger.missing(loss, times)]
        if not waiting:
            times, waiting = times + 1, list(losses)
            continue
        loss = min(waiting, key=lambda loss: _urgency(loss, ledger))
        ledger.cover(loss, times)
        waiting.remove(loss)
    return ledger.chosen


def _urgency(loss: Loss, ledger: _Ledger) -> tuple[bool, bool, int, ReplicaId, NodeId]:
    """What can be covered whole first, best away from its node, then what mostly is already."""
    held = sum(ledger.holds(rank, besides=loss.node) for rank in loss.ranks)
    count = len(loss.ranks)
    return count > ledger.left, count > ledger.left_away(loss.node), -held, loss.replica, loss.node


class _Ledger:
    """Spots that are still to be had, and what was chosen."""

    def __init__(self, spots: Sequence[Spot], left: int) -> None:
        self.left = left
        self.chosen: dict[tuple[NodeId, str], Choice] = {}
        self._spots = list(spots)
        # Nodes of the chosen spots, and of those still to be had, by rank.
        self._copies: dict[int, list[NodeId]] = {}
        self._holding: dict[int | None, Counter[NodeId]] = {}
        self._at = Counter(spot.node for spot in spots)
        for spot in spots:
            self._holding.setdefault(spot.rank, Counter())[spot.node] += 1

    def left_away(self, node: NodeId) -> int:
        """Spots that are still to be had on other nodes."""
        return min(self.left, len(self._spots) - self._at[node])

    def holds(self, rank: int, besides: NodeId) -> bool:
        """A spot on another node holds the rank's shard."""
        return any(count and node != besides for node, count in self._holding.get(rank, Counter[NodeId]()).items())

    def missing(self, loss: Loss, times: int) -> list[int]:
        """Ranks of the loss with fewer than `times` copies away from its node."""
        return [rank for rank in loss.ranks if self._away(rank, loss) < times]

    def _away(self, rank: int, loss: Loss) -> int:
        return sum(node != loss.node for node in self._copies.get(rank, ()))

    def cover(self, loss: Loss, times: int) -> None:
        """Choose a spot for each rank that is missing, as far as there are any; off the loss's node where it can."""
        missing = self.missing(loss, times)
        missing.sort(key=lambda rank: (self._away(rank, loss), not self.holds(rank, besides=loss.node), rank))
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
        self._holding[spot.rank][spot.node] -= 1
        self._at[spot.node] -= 1
        self.left -= 1
        self._copies.setdefault(rank, []).append(spot.node)
        self.chosen[spot.node, spot.device] = Choice(rank, _reason(rank, loss, near=spot.node == loss.node))


def _reason(rank: int, loss: Loss, *, near: bool) -> Reason:
    if near:
        text = f"rank {rank} of {loss.replica} on its own node {loss.node}: no other has a free device"
    else:
        text = f"rank {rank} of {loss.replica} would be lost with {loss.node}"
    return Reason(kind=ReasonKind.REPLACED, text=text, node=loss.node, group=loss.replica)
