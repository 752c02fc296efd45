"""What the leader asks of replica epochs on this node.

A stage (prepare, form, load) is answered once, when all of this node's ranks have answered or the first has failed.
An epoch that ends keeps its processes and weights; only a Release lets processes go.
"""

from __future__ import annotations

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import RankPhase, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.session import (
    AbortGroup,
    FormGroup,
    GroupPhase,
    LoadReplica,
    PrepareGroup,
    ReleaseReplica,
)
from dataplane import frames
from dataplane.core.endings import BLAMING, STAGES, answer, close, end_if_free, fail_stage, ranks_of
from dataplane.core.messages import DeviceId, MarkEpochsOver, Recorded, SendRank
from dataplane.core.state import Rank, Replica, Turn
from dataplane.core.terms import fence_epoch, tell_rank

_ORDER = [*STAGES, ReplicaPhase.READY]


def prepare(turn: Turn, message: PrepareGroup) -> None:
    """Bind this node's ranks to a new epoch. Repeating the same one repeats its answer."""
    state = turn.state
    held = state.replicas.get(message.replica)
    if held is not None and (held.epoch, held.nonce) == (message.epoch, message.nonce):
        _answer_again(turn, held, ReplicaPhase.PREPARING)
        return
    if message.epoch <= state.epochs.get(message.replica, 0):
        fence_epoch(turn, message, message.epoch)
        return
    refusal = _refusal(turn, message)
    if refusal is not None:
        answer(turn, message.replica, message.epoch, GroupPhase.PREPARED, refusal)
        return
    turn.emit(Recorded("replica_preparing", message.replica, message.epoch))
    _take_ranks(turn, message)
    replica = _new_replica(turn, message)
    state.epochs[message.replica] = message.epoch
    state.replicas[message.replica] = replica
    for member in message.members:
        if member.node == state.identity.node:
            state.ranks[member.device].bind(message.replica, message.epoch, member.rank)
    for rank in ranks_of(turn, replica):
        advance(turn, rank)


def form(turn: Turn, message: FormGroup) -> None:
    """Let the ranks meet at the rendezvous."""
    replica = _stage(turn, message, ReplicaPhase.FORMING)
    if replica is not None:
        frame = frames.Form(epoch=message.epoch, rendezvous=message.rendezvous, deadline_ms=message.deadline_ms)
        _begin(turn, replica, ReplicaPhase.FORMING, message.deadline_ms, frame, RankPhase.FORMING)


def load(turn: Turn, message: LoadReplica) -> None:
    """Let the ranks load their weights."""
    replica = _stage(turn, message, ReplicaPhase.LOADING)
    if replica is not None:
        frame = frames.Load(epoch=message.epoch, sources=message.sources)
        _begin(turn, replica, ReplicaPhase.LOADING, message.deadline_ms, frame, RankPhase.LOADING)


def abort(turn: Turn, message: AbortGroup) -> None:
    """End the epoch; answered when every rank has let go of it. An epoch that is not here is over already."""
    replica = _to_end(turn, message, GroupPhase.ABORTED)
    if replica is not None:
        close(turn, replica, message.reason, blameless=message.reason.kind not in BLAMING)
        end_if_free(turn, replica)


def release(turn: Turn, message: ReleaseReplica) -> None:
    """End the replica: its ranks exit; answered when they are gone."""
    replica = _to_end(turn, message, GroupPhase.RELEASED)
    if replica is None:
        return
    close(turn, replica, message.reason, blameless=True)
    for rank in ranks_of(turn, replica):
        rank.leaving = True
        rank.let_go_by = turn.now + turn.state.timings.stage
        turn.emit(SendRank(rank.device, frames.Exit()))
    end_if_free(turn, replica)


def advance(turn: Turn, rank: Rank) -> None:
    """Send its Prepare to a rank that is free to hear of it; else it comes when the rank is."""
    replica = turn.state.replicas.get(rank.replica)
    free = rank.phase is RankPhase.IDLE and rank.aborting is None and not rank.leaving and rank.killed is None
    if replica is None or not free:
        return
    frame = replica.prepare.pop(rank.device, None)
    if frame is not None:
        rank.phase, rank.preload = RankPhase.FORMING, None
        tell_rank(turn, rank)
        # The page may still hold the last epoch of another replica.
        turn.emit(MarkEpochsOver(rank.device, Epoch(frame.epoch - 1)))
        turn.emit(SendRank(rank.device, frame))


def stage_answered(turn: Turn, replica: Replica, device: DeviceId) -> None:
    """One rank did its part of the stage; the last one answers for all."""
    if device not in replica.owing:
        return
    replica.owing.discard(device)
    if replica.owing:
        return
    done = STAGES[replica.phase]
    replica.deadline = None
    if done is GroupPhase.LOADED:
        replica.phase = ReplicaPhase.READY
        turn.state.heartbeat_due = True
        turn.emit(Recorded("replica_ready", replica.replica, replica.epoch))
    answer(turn, replica.replica, replica.epoch, done, replica=replica)


def fail_late_stages(turn: Turn) -> None:
    """End the epochs whose present stage is past its deadline, naming who did not answer."""
    for replica in list(turn.state.replicas.values()):
        if replica.deadline is not None and turn.now >= replica.deadline:
            fail_stage(turn, replica, _late_reason(turn, replica))


def _late_reason(turn: Turn, replica: Replica) -> Reason:
    late = [rank for rank in ranks_of(turn, replica) if rank.device in replica.owing]
    names = ", ".join(f"{rank.device} ({rank.phase.name.lower()})" for rank in late)
    return Reason(
        kind=ReasonKind.DEADLINE,
        text=f"no answer while {replica.phase.name.lower()} from {names}",
        node=turn.state.identity.node,
        rank=late[0].rank,
        group=replica.replica,
    )


def _refusal(turn: Turn, message: PrepareGroup) -> Reason | None:
    state = turn.state
    devices = [member.device for member in message.members if member.node == state.identity.node]
    if state.leaving is not None:
        return state.leaving
    if not devices:
        return Reason(kind=ReasonKind.INVALID, text=f"no member of {message.replica} is on {state.identity.node}")
    if len(set(devices) & state.ranks.keys()) < len(devices):
        text = f"{devices} are not distinct devices of {sorted(state.ranks)}"
        return Reason(kind=ReasonKind.INVALID, text=text, node=state.identity.node)
    return None


def _take_ranks(turn: Turn, message: PrepareGroup) -> None:
    """End the epochs that the new one replaces, by name or by device, and free its ranks from them. A rank that owes
    an Aborted gets its Prepare after that."""
    state = turn.state
    wanted = [state.ranks[member.device] for member in message.members if member.node == state.identity.node]
    replaced = {rank.replica for rank in wanted} | {message.replica}
    reason = Reason(
        kind=ReasonKind.REPLACED, text=f"epoch {message.epoch} of {message.replica} begins", group=message.replica
    )
    for holder in [state.replicas[name] for name in replaced & state.replicas.keys()]:
        close(turn, holder, reason, blameless=True)
        for rank in ranks_of(turn, holder):
            if rank in wanted or holder.replica == message.replica:
                rank.unbind()
        end_if_free(turn, holder)


def _new_replica(turn: Turn, message: PrepareGroup) -> Replica:
    state = turn.state
    local = {member.rank: member.device for member in message.members if member.node == state.identity.node}
    return Replica(
        replica=message.replica,
        epoch=message.epoch,
        nonce=message.nonce,
        driver=local.get(0),
        owing=set(local.values()),
        deadline=_deadline(turn, message.deadline_ms),
        prepare={
            device: frames.Prepare(
                replica=message.replica,
                epoch=message.epoch,
                rank=number,
                members=message.members,
                nonce=message.nonce,
                spec=message.spec,
                collective_timeout_ms=round(state.timings.collective_timeout * 1000),
            )
            for number, device in local.items()
        },
    )


def _begin(
    turn: Turn, replica: Replica, phase: ReplicaPhase, deadline_ms: int, frame: frames.DaemonFrame, rank: RankPhase
) -> None:
    members = ranks_of(turn, replica)
    replica.phase = phase
    replica.owing = {member.device for member in members}
    replica.deadline = _deadline(turn, deadline_ms)
    for member in members:
        member.phase = rank
        turn.emit(SendRank(member.device, frame))


def _deadline(turn: Turn, deadline_ms: int) -> float | None:
    return turn.now + deadline_ms / 1000 if deadline_ms else None


def _stage(turn: Turn, message: FormGroup | LoadReplica, phase: ReplicaPhase) -> Replica | None:
    """The replica if it may enter `phase` now; repeats and strays are answered here."""
    replica = turn.state.replicas.get(message.replica)
    if replica is None or replica.epoch != message.epoch:
        fence_epoch(turn, message, message.epoch)
        return None
    before = _ORDER[_ORDER.index(phase) - 1]
    if replica.phase is before and not replica.owing:
        return replica
    _answer_again(turn, replica, phase)
    return None


def _answer_again(turn: Turn, replica: Replica, phase: ReplicaPhase) -> None:
    """Repeat the answer to a stage that is done; one under way will be answered when it is."""
    if replica.phase not in _ORDER:
        answer(turn, replica.replica, replica.epoch, STAGES[phase], replica.reason)
    elif _ORDER.index(replica.phase) > _ORDER.index(phase) or (replica.phase is phase and not replica.owing):
        answer(turn, replica.replica, replica.epoch, STAGES[phase], replica=replica)


def _to_end(turn: Turn, message: AbortGroup | ReleaseReplica, phase: GroupPhase) -> Replica | None:
    """The epoch to end, noting that its end is owed; one that is not here is answered at once."""
    replica = turn.state.replicas.get(message.replica)
    if replica is not None and replica.epoch == message.epoch:
        replica.ending = phase
        return replica
    if message.epoch < turn.state.epochs.get(message.replica, 0):
        fence_epoch(turn, message, message.epoch)
    else:
        answer(turn, message.replica, message.epoch, phase)
    return None
