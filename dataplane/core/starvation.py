"""Time in which ranks could not have moved: the judge of their progress (controlplane/core/stall.py) leaves it out."""

from __future__ import annotations

from dataplane.core.endings import ranks_of
from dataplane.core.messages import Tick
from dataplane.core.state import Rank, Replica, Turn


def count(turn: Turn, event: Tick) -> None:
    """Add what passed since the last tick, before its samples replace the last ones."""
    for replica in turn.state.replicas.values():
        replica.starved_s += _since(turn, replica, event)


def _since(turn: Turn, replica: Replica, event: Tick) -> float:
    """One starved rank holds all up. While this daemon itself was late nobody saw whether they moved."""
    return max([event.loop_lag, *(_of(rank, event) for rank in ranks_of(turn, replica))])


def _of(rank: Rank, event: Tick) -> float:
    now = event.samples.get(rank.device)
    return 0.0 if now is None or rank.sample is None else now.starved_s - rank.sample.starved_s
