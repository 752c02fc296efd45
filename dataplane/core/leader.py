"""The session with the leader: fences, frames down, the snapshot, heartbeats, leaving."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.runtime.ids import Term
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.session import (
    AbortGroup,
    AssignBatch,
    AssignLapsed,
    DrainNode,
    FormGroup,
    Heartbeat,
    LoadReplica,
    PrepareGroup,
    QueueClass,
    RankInfo,
    ReleaseReplica,
    Relet,
    ReplicaInfo,
    ReplicaLoad,
    SequenceInfo,
    SequencePhase,
    SessionRefused,
    TakeCheckpoint,
    UndrainNode,
    WorkerSnapshot,
    WorkerWelcome,
)
from controlplane.runtime.messages.weights import PreloadWeights
from dataplane.core import drain, groups, weights
from dataplane.core.endings import ranks_of
from dataplane.core.gateways import tell_leader
from dataplane.core.health import health
from dataplane.core.messages import (
    LeaderClosed,
    LeaderOpened,
    LeaderSaid,
    LeaveLeader,
    Recorded,
    RenewLease,
    SendLeader,
)
from dataplane.core.state import Leader, Replica, Request, Reservation, Turn
from dataplane.core.terms import fence_term, raise_term, tell

SNAPSHOT_SEQUENCES_MAX = 2000
"""Sequences a chunk of the snapshot; some 100 bytes each."""

HEARTBEAT_SPACING = 0.1
"""Heartbeats on change leave at least this part of the heartbeat interval apart."""


def on_opened(turn: Turn, event: LeaderOpened) -> None:
    """Say Hello to whom the link leads to; an older link is over."""
    state = turn.state
    if state.leader is not None:
        reason = Reason(kind=ReasonKind.SUPERSEDED, text="a newer link was opened")
        turn.emit(LeaveLeader(state.leader.link, reason, state.highest_term))
    state.leader = Leader(event.link, event.address)
    turn.emit(SendLeader(event.link, state.identity.hello(state.highest_term, state.lease_id)))


def on_closed(turn: Turn, event: LeaderClosed) -> None:
    state = turn.state
    if state.leader is not None and state.leader.link == event.link:
        if state.leader.session is not None:
            turn.emit(Recorded("session_ended", details={"term": str(state.leader.term)}))
        state.leader = None


def on_said(turn: Turn, event: LeaderSaid) -> None:
    """One frame of a leader, unless its link, session or term is over."""
    state = turn.state
    leader = state.leader
    if leader is None or leader.link != event.link:
        state.fenced[type(event.body).__name__] += 1
        return
    match event.body:
        case SessionRefused() as refused:
            _refused(turn, leader, refused)
        case WorkerWelcome() as welcome:
            _welcomed(turn, leader, welcome)
        case body if event.head.term < state.highest_term or leader.session is None:
            fence_term(turn, body, event.head.term)
        case body:
            _obey(turn, body)


def _obey(turn: Turn, body: object) -> None:
    match body:
        case AssignBatch():
            _assign(turn, body)
        case PrepareGroup():
            groups.prepare(turn, body)
        case FormGroup():
            groups.form(turn, body)
        case LoadReplica():
            groups.load(turn, body)
        case PreloadWeights():
            weights.preload(turn, body)
        case AbortGroup():
            groups.abort(turn, body)
        case ReleaseReplica():
            groups.release(turn, body)
        case DrainNode():
            if body.exit:
                drain.leave(turn, body.reason, body.deadline_ms)
            else:
                drain.begin(turn, body.deadline_ms, body.reason)
        case UndrainNode():
            drain.undo(turn)
        case Relet():
            turn.emit(Recorded("lease_relet", reason=body.reason))
            turn.emit(RenewLease())
        case _:
            assert isinstance(body, TakeCheckpoint)
            # Serving replicas hold nothing that is not on disk already.
            turn.emit(Recorded("checkpoint_ignored", details={"checkpoint": body.checkpoint}))


def _refused(turn: Turn, leader: Leader, refused: SessionRefused) -> None:
    state = turn.state
    raise_term(turn, refused.highest_term)
    turn.emit(Recorded("session_refused", reason=refused.reason))
    turn.emit(LeaveLeader(leader.link, refused.reason, state.highest_term, refused.leader_address))
    state.leader = None


def _welcomed(turn: Turn, leader: Leader, welcome: WorkerWelcome) -> None:
    """Begin the session with all that this node holds; a leader of an old term is left, and one whose term another
    process led in before etcd was restored: such a term is good for nobody."""
    state = turn.state
    if state.welcomed is not None and state.welcomed[0] == welcome.term and state.welcomed[1] != welcome.leader:
        raise_term(turn, Term(welcome.term + 1))
    if welcome.term < state.highest_term:
        fence_term(turn, welcome, welcome.term)
        text = f"the leader's term {welcome.term} is below {state.highest_term}"
        reason = Reason(kind=ReasonKind.STALE_TERM, text=text)
        turn.emit(LeaveLeader(leader.link, reason, state.highest_term))
        state.leader = None
        return
    raise_term(turn, welcome.term)
    state.welcomed = (welcome.term, welcome.leader)
    leader.term, leader.session = welcome.term, welcome.session
    if state.leader_address != leader.address:
        state.leader_address = leader.address
        tell_leader(turn)
    turn.emit(Recorded("session_begun", details={"term": str(welcome.term), "session": str(welcome.session)}))
    for chunk in _snapshot(turn):
        tell(turn, chunk)
    drain.tell_again(turn)
    beat(turn)


def _assign(turn: Turn, batch: AssignBatch) -> None:
    """Reserve room; the body alone admits."""
    state = turn.state
    for permit in batch.permits:
        replica = state.replicas.get(permit.replica)
        if permit.term < state.highest_term or replica is None or replica.epoch != permit.epoch:
            state.fenced["AssignBatch"] += 1
        elif permit.request not in state.requests:
            state.reservations[permit.request] = Reservation(permit, turn.now + state.timings.stage)


def lapse(turn: Turn) -> None:
    """Give up reservations whose body never came."""
    state = turn.state
    lapsed = [entry.permit for entry in state.reservations.values() if turn.now >= entry.lapses]
    for permit in lapsed:
        del state.reservations[permit.request]
    if lapsed:
        tell(turn, AssignLapsed(permits=tuple(lapsed)))


# ---------------------------------------------------------------- snapshot


def _snapshot(turn: Turn) -> Iterator[WorkerSnapshot]:
    state = turn.state
    ranks = tuple(
        RankInfo(
            device=rank.device,
            pid=rank.pid,
            phase=rank.phase,
            replica=rank.replica,
            epoch=rank.epoch,
            rank=rank.rank,
            held=weights.held_for_others(rank),
        )
        for rank in state.ranks.values()
    )
    sequences = tuple(map(_sequence_info, state.requests.values()))
    cuts = range(0, max(1, len(sequences)), SNAPSHOT_SEQUENCES_MAX)
    for start in cuts:
        first, last = start == 0, start == cuts[-1]
        yield WorkerSnapshot(
            ranks=ranks if first else (),
            replicas=_replica_infos(turn) if first else (),
            sequences=sequences[start : start + SNAPSHOT_SEQUENCES_MAX],
            last=last,
            draining=state.draining,
        )


def _replica_infos(turn: Turn) -> tuple[ReplicaInfo, ...]:
    """Replicas that are gone stand here too, closed: their epochs must not come again after a store's restore."""
    state = turn.state
    return tuple(
        ReplicaInfo(replica=name, epoch=epoch, phase=ReplicaPhase.CLOSED)
        if (held := state.replicas.get(name)) is None
        else ReplicaInfo(replica=name, epoch=epoch, phase=held.phase, capacity=held.capacity)
        for name, epoch in state.epochs.items()
    )


def _sequence_info(request: Request) -> SequenceInfo:
    permit = request.permit
    orphaned = request.stream is None and request.running
    return SequenceInfo(
        gateway=request.gateway,
        request=permit.request,
        attempt=permit.attempt,
        replica=permit.replica,
        epoch=permit.epoch,
        phase=SequencePhase.ORPHAN if orphaned else request.phase,
        tokens=len(request.prompt) // 4 + sum(len(choice.tokens) for choice in request.choices),
        choices=len(request.choices),
    )


# ---------------------------------------------------------------- heartbeat


def beat_if_due(turn: Turn) -> None:
    """A heartbeat every interval, and sooner when something changed."""
    state = turn.state
    waited = turn.now - state.last_heartbeat
    interval = state.timings.heartbeat_interval
    # Half a tick early is better than a whole one late.
    if waited >= interval * (1 - HEARTBEAT_SPACING / 2) or (
        state.heartbeat_due and waited >= interval * HEARTBEAT_SPACING
    ):
        beat(turn)


def beat(turn: Turn) -> None:
    """Tell the leader how all stands."""
    state = turn.state
    state.last_heartbeat, state.heartbeat_due = turn.now, False
    tell(
        turn,
        Heartbeat(
            uptime_ms=round((turn.now - state.started) * 1000),
            loop_lag_ms=round(state.loop_lag * 1000),
            replicas=tuple(
                _load(turn, replica) for replica in state.replicas.values() if replica.phase is ReplicaPhase.READY
            ),
            health=tuple(map(health, state.ranks.values())),
        ),
    )


def _load(turn: Turn, replica: Replica) -> ReplicaLoad:
    progress = sum(rank.sample.progress for rank in ranks_of(turn, replica) if rank.sample is not None)
    starved_ms = round(replica.starved_s * 1000)
    load, capacity = replica.load, replica.capacity
    idle_blocks = capacity.total_blocks if capacity is not None else 0
    if load is None:
        return ReplicaLoad(
            replica=replica.replica,
            epoch=replica.epoch,
            free_blocks=idle_blocks,
            running=0,
            waiting=_held(turn, replica),
            progress=progress,
            starved_ms=starved_ms,
        )
    # What the engine has not spoken of yet waits on its way to it.
    waiting = max(load.waiting, _held(turn, replica) - load.running)
    return ReplicaLoad(
        replica=replica.replica,
        epoch=replica.epoch,
        free_blocks=load.free_blocks,
        running=load.running,
        waiting=waiting,
        step_ms=load.step_ms,
        progress=progress,
        starved_ms=starved_ms,
        prefix_digest=load.prefix_digest,
        waiting_tokens=load.waiting_tokens,
        queue=tuple(
            QueueClass(priority=priority, count=count, tokens=tokens) for priority, count, tokens in load.queue
        ),
    )


def _held(turn: Turn, replica: Replica) -> int:
    return sum(request.permit.replica == replica.replica for request, _ in turn.state.sequences.values())
