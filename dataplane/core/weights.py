"""Weights on this node's devices: what each rank holds, and what free ranks load ahead of need."""

from __future__ import annotations

from controlplane.runtime.messages.common import RankPhase, Reason, ReasonKind
from controlplane.runtime.messages.weights import HeldWeights, PreloadWeights, WeightsState
from dataplane import frames
from dataplane.core.endings import kill_if_spoilt, kill_rank
from dataplane.core.messages import Recorded, SendRank
from dataplane.core.state import Preload, Rank, Turn
from dataplane.core.terms import tell


def preload(turn: Turn, message: PreloadWeights) -> None:
    """Let a free rank load a shard. One that is not free is left alone, and the leader told why."""
    state = turn.state
    rank = state.ranks.get(message.device)
    if rank is None:
        text = f"{message.device} is none of {sorted(state.ranks)}"
        reason = Reason(kind=ReasonKind.INVALID, text=text, node=state.identity.node)
        tell(turn, WeightsState(device=message.device, pid=0, reason=reason))
        return
    refusal = _refusal(turn, rank)
    if refusal is not None:
        _tell_weights(turn, rank, refusal)
        return
    host = state.identity.serve_address.rpartition(":")[0]
    frame = frames.Preload(message.rank, message.spec, host, message.sources)
    if rank.preload is not None and _shard(rank.preload.frame) == _shard(frame):
        return
    rank.preload = Preload(frame, _progress(rank), turn.now)
    details = {"device": rank.device, "rank": str(message.rank)}
    turn.emit(Recorded("preload_begun", details=details))
    turn.emit(SendRank(rank.device, frame))


def holds(turn: Turn, rank: Rank, frame: frames.Holds) -> None:
    """A rank's word on what it holds."""
    rank.held = frame.held
    if rank.preload is not None and (frame.reason is not None or _is_of(frame.held, rank.preload.frame)):
        rank.preload = None
        details = {"device": rank.device}
        turn.emit(Recorded("preload_failed" if frame.reason else "preload_done", reason=frame.reason, details=details))
    _tell_weights(turn, rank, frame.reason)
    if frame.reason is not None:
        kill_if_spoilt(turn, rank, frame.reason)


def held_for_others(rank: Rank) -> HeldWeights | None:
    """What a process that is about to go still holds is of no use to anybody."""
    return None if rank.leaving or rank.killed is not None else rank.held


def kill_stuck(turn: Turn) -> None:
    """Kill a rank whose preload stands still, a tensor that a dead disk never gives, say: it would hear of no epoch."""
    for rank in turn.state.ranks.values():
        if rank.preload is None:
            continue
        if _progress(rank) != rank.preload.progress:
            rank.preload.progress, rank.preload.moved = _progress(rank), turn.now
        elif turn.now - rank.preload.moved >= turn.state.timings.load_progress:
            text = f"{rank.device} loads weights ahead of need and stands still"
            kill_rank(turn, rank, Reason(kind=ReasonKind.NO_PROGRESS, text=text, node=turn.state.identity.node))


def _refusal(turn: Turn, rank: Rank) -> Reason | None:
    state = turn.state
    if state.leaving is not None:
        return state.leaving
    if rank.phase is RankPhase.IDLE and not rank.bound and not (rank.aborting or rank.leaving or rank.killed):
        return None
    what = f"bound to {rank.replica}" if rank.bound else rank.phase.name.lower()
    return Reason(kind=ReasonKind.NO_CAPACITY, text=f"{rank.device} is {what}", node=state.identity.node)


def _tell_weights(turn: Turn, rank: Rank, reason: Reason | None) -> None:
    tell(turn, WeightsState(device=rank.device, pid=rank.pid, held=held_for_others(rank), reason=reason))


def _shard(frame: frames.Preload) -> tuple[object, ...]:
    return frame.spec, frame.rank


def _is_of(held: HeldWeights | None, frame: frames.Preload) -> bool:
    return held is not None and (held.degrees, held.rank) == (frame.spec.degrees, frame.rank)


def _progress(rank: Rank) -> int:
    return 0 if rank.sample is None else rank.sample.progress
