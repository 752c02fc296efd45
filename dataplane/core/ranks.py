"""What rank processes say, and what their ends mean."""

from __future__ import annotations

from dataclasses import replace

from controlplane.runtime.ids import Epoch, ReplicaId, RequestId
from controlplane.runtime.messages import session
from controlplane.runtime.messages.common import RankPhase, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.session import RankState
from controlplane.runtime.messages.weights import WeightsState
from dataplane import frames
from dataplane.core.endings import (
    BLAMING,
    OPEN,
    STAGES,
    close,
    end_if_free,
    fail_stage,
    kill_if_spoilt,
    kill_rank,
    let_go,
    ranks_of,
    suspects_of,
)
from dataplane.core.groups import advance, stage_answered
from dataplane.core.messages import RankExited, RankForked, RankSaid, Recorded, SpawnRank
from dataplane.core.state import Rank, Replica, Turn
from dataplane.core.steps import RankFault, load_report, step_begun, step_done
from dataplane.core.terms import rank_state, tell, tell_rank
from dataplane.core.weights import holds

_SERVING = {
    ReplicaPhase.PREPARING: RankPhase.FORMING,
    ReplicaPhase.FORMING: RankPhase.LOADING,
    ReplicaPhase.LOADING: RankPhase.SERVING,
}


# ---------------------------------------------------------------- processes


def on_forked(turn: Turn, event: RankForked) -> None:
    rank = turn.state.ranks[event.device]
    rank.pid, rank.phase = event.pid, RankPhase.STARTING
    rank.killed, rank.leaving, rank.let_go_by, rank.aborting = None, False, None, None


def on_exited(turn: Turn, event: RankExited) -> None:
    """A rank process is gone: its epoch ends here, its peers keep their processes, and a fresh one is forked."""
    rank = turn.state.ranks[event.device]
    if event.pid != rank.pid:
        return
    reason = rank.killed or event.reason
    blameless = event.exonerates and rank.killed is None
    starting, by_order = rank.phase in (RankPhase.STARTING, RankPhase.EXITED), rank.leaving
    replica = turn.state.replicas.get(rank.replica)
    if replica is not None and rank.device in replica.prepare:
        # It was not told of its epoch yet: the next process will do as well.
        replica = None
    turn.emit(_record("rank_exited", rank, reason, event))
    if not by_order:
        tell(turn, _exit_state(turn, rank, replica, reason, event, blameless))
    elif rank.held is not None:
        tell(turn, WeightsState(device=rank.device, pid=rank.pid))
    _clear(rank, reason)
    if replica is not None:
        rank.unbind()
        close(turn, replica, reason, blameless=blameless)
        end_if_free(turn, replica)
    _respawn(turn, rank, starting)


def spawn_due(turn: Turn) -> None:
    """Fork the ranks whose time has come."""
    if turn.state.departed:
        return
    for rank in turn.state.ranks.values():
        if rank.spawn_at is not None and turn.now >= rank.spawn_at:
            rank.spawn_at = None
            turn.emit(SpawnRank(rank.device))


def _exit_state(
    turn: Turn, rank: Rank, replica: Replica | None, reason: Reason, event: RankExited, blameless: bool
) -> RankState:
    state = replace(
        rank_state(rank, reason, _requests_of(turn, replica, blameless)),
        phase=RankPhase.EXITED,
        exit_code=event.exit_code,
        exit_signal=event.exit_signal,
    )
    return state if replica is not None else replace(state, replica=ReplicaId(""), epoch=Epoch(0), rank=0)


def _clear(rank: Rank, reason: Reason) -> None:
    rank.pid, rank.phase, rank.sample = 0, RankPhase.EXITED, None
    rank.held = rank.preload = None
    rank.aborting, rank.leaving, rank.let_go_by, rank.killed = None, False, None, None
    rank.fault = reason


def _respawn(turn: Turn, rank: Rank, starting: bool) -> None:
    """At once after a working process, later and later after ones that did not come up."""
    timings = turn.state.timings
    rank.false_starts = rank.false_starts + 1 if starting else 0
    delay = 0.0
    if rank.false_starts:
        delay = min(timings.stage, timings.reconnect_min * 2 ** min(rank.false_starts, 16))
    rank.spawn_at = turn.now + delay
    spawn_due(turn)


def _requests_of(turn: Turn, replica: Replica | None, blameless: bool) -> tuple[RequestId, ...]:
    if replica is None or blameless:
        return ()
    held = turn.state.sequences
    return tuple(sorted({held[sequence][0].request for sequence in suspects_of(replica) if sequence in held}))


def _record(name: str, rank: Rank, reason: Reason, event: RankExited | None = None) -> Recorded:
    details = {"device": rank.device, "pid": str(rank.pid)}
    if event is not None and event.exit_signal is not None:
        details["signal"] = str(event.exit_signal)
    elif event is not None and event.exit_code is not None:
        details["code"] = str(event.exit_code)
    return Recorded(name, rank.replica, rank.epoch, reason=reason, details=details)


# ---------------------------------------------------------------- frames


def on_said(turn: Turn, event: RankSaid) -> None:
    """One frame of a rank. Those of an epoch that is over are dropped."""
    rank = turn.state.ranks[event.device]
    if rank.pid != event.pid or rank.killed is not None:
        return
    try:
        _obey(turn, rank, event.frame)
    except RankFault as fault:
        text = f"{rank.device} broke the protocol: {fault}"
        kill_rank(turn, rank, Reason(kind=ReasonKind.GROUP_FAILED, text=text, node=turn.state.identity.node))


def _obey(turn: Turn, rank: Rank, frame: frames.RankFrame) -> None:
    if isinstance(frame, frames.Hello):
        _came_up(turn, rank)
        return
    if isinstance(frame, frames.Holds):
        holds(turn, rank, frame)
        return
    if isinstance(frame, frames.Aborted):
        _aborted(turn, rank, frame)
        return
    if isinstance(frame, frames.Failed) and rank.aborting is not None and rank.aborting[1] == frame.epoch:
        # It left the epoch by itself before it read the Abort.
        _freed(turn, rank)
        return
    replica = turn.state.replicas.get(rank.replica)
    if replica is None or rank.aborting is not None or replica.epoch != frame.epoch or replica.phase not in OPEN:
        turn.state.fenced[type(frame).__name__] += 1
        return
    match frame:
        case frames.StepDone():
            step_done(turn, replica, frame)
        case frames.StepBegun():
            step_begun(replica, frame)
        case frames.LoadReport():
            load_report(turn, replica, frame)
        case frames.GroupCosts():
            turn.state.count_exchanges(rank.device, frame.costs)
        case frames.LoadProgress():
            _load_progress(turn, replica, rank, frame)
        case frames.Failed():
            _failed(turn, replica, rank, frame.reason)
        case frames.Prepared():
            replica.rendezvous = replica.rendezvous or frame.rendezvous
            _stage_done(turn, replica, rank, ReplicaPhase.PREPARING)
        case frames.Formed():
            _stage_done(turn, replica, rank, ReplicaPhase.FORMING)
        case frames.Loaded():
            if rank.device == replica.driver:
                replica.capacity = frame.capacity
            _stage_done(turn, replica, rank, ReplicaPhase.LOADING)


def _came_up(turn: Turn, rank: Rank) -> None:
    if rank.phase is not RankPhase.STARTING:
        raise RankFault("a second Hello")
    rank.phase, rank.false_starts, rank.fault = RankPhase.IDLE, 0, None
    turn.emit(Recorded("rank_ready", details={"device": rank.device, "pid": str(rank.pid)}))
    tell_rank(turn, rank)
    advance(turn, rank)


def _aborted(turn: Turn, rank: Rank, frame: frames.Aborted) -> None:
    if rank.aborting is None or rank.aborting[1] != frame.epoch:
        turn.state.fenced["Aborted"] += 1
        return
    _freed(turn, rank)


def _freed(turn: Turn, rank: Rank) -> None:
    if not rank.leaving:
        let_go(turn, rank)
        tell_rank(turn, rank)
        advance(turn, rank)


def _stage_done(turn: Turn, replica: Replica, rank: Rank, stage: ReplicaPhase) -> None:
    if replica.phase is not stage or rank.device not in replica.owing:
        raise RankFault(f"answered {stage.name.lower()} while {replica.phase.name.lower()}")
    rank.phase = _SERVING[stage]
    if rank.phase is RankPhase.SERVING:
        tell_rank(turn, rank)
    stage_answered(turn, replica, rank.device)


def _failed(turn: Turn, replica: Replica, rank: Rank, reason: Reason) -> None:
    """The rank could not do its part and is idle: the epoch is over."""
    turn.emit(_record("rank_failed", rank, reason))
    in_stage = replica.phase in STAGES
    blameless = reason.kind not in BLAMING
    if not in_stage:
        suspects = _requests_of(turn, replica, blameless)
        tell(turn, replace(rank_state(rank, reason, suspects), phase=RankPhase.IDLE))
    rank.unbind()
    rank.phase = RankPhase.IDLE
    if in_stage:
        fail_stage(turn, replica, reason)
    else:
        close(turn, replica, reason, blameless=blameless)
    kill_if_spoilt(turn, rank, reason)


def _load_progress(turn: Turn, replica: Replica, rank: Rank, frame: frames.LoadProgress) -> None:
    """The slowest rank's progress, told in thousandths: a hundredth of a large model may take a slow disk longer than a
    load may stand still."""
    replica.loaded[rank.device] = frame.fraction
    fraction = min(replica.loaded.get(member.device, 0.0) for member in ranks_of(turn, replica))
    told = (frame.stage, int(fraction * 1000))
    if told != replica.load_told:
        replica.load_told = told
        tell(
            turn,
            session.LoadProgress(replica=replica.replica, epoch=replica.epoch, stage=frame.stage, fraction=fraction),
        )
