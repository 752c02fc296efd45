"""How replica epochs end on this node: sequences lost, ranks told to let go, the one that does not let go killed."""

from __future__ import annotations

from collections import defaultdict

from controlplane.runtime.ids import Epoch, ReplicaId
from controlplane.runtime.messages.common import RankPhase, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.session import GroupPhase, GroupState
from dataplane import frames
from dataplane.core.messages import KillRank, MarkEpochsOver, Recorded, SendRank
from dataplane.core.shadows import lose
from dataplane.core.state import Rank, Replica, Turn
from dataplane.core.terms import tell
from dataplane.frames import SequenceId

STAGES = {
    ReplicaPhase.PREPARING: GroupPhase.PREPARED,
    ReplicaPhase.FORMING: GroupPhase.FORMED,
    ReplicaPhase.LOADING: GroupPhase.LOADED,
}
"""The answer that each phase owes the leader."""

BLAMING = (ReasonKind.NO_PROGRESS, ReasonKind.OUT_OF_MEMORY, ReasonKind.DEVICE_SICK, ReasonKind.ENGINE_FAULT)
"""Ends that the sequences of an unfinished step may have caused; a lost peer or a planned change says nothing."""

OPEN = (*STAGES, ReplicaPhase.READY)


def close(turn: Turn, replica: Replica, reason: Reason, *, blameless: bool = False) -> None:
    """The epoch is over here: its sequences are lost, its ranks are told to leave it. A no-op the second time.

    `blameless`: what ended it says nothing against the sequences in its unfinished steps.
    """
    if replica.phase not in OPEN:
        return
    lose(turn, replica, reason, frozenset() if blameless else suspects_of(replica))
    replica.phase, replica.reason = ReplicaPhase.CLOSED, reason
    replica.deadline = replica.load = None
    replica.owing.clear()
    replica.steps.clear()
    turn.state.heartbeat_due = True
    turn.emit(Recorded("replica_closed", replica.replica, replica.epoch, reason=reason))
    for rank in ranks_of(turn, replica):
        _abort_rank(turn, replica, rank)
    replica.prepare.clear()
    end_if_free(turn, replica)


def fail_stage(turn: Turn, replica: Replica, reason: Reason) -> None:
    """The present stage cannot be done: say so, and end the epoch."""
    answer(turn, replica.replica, replica.epoch, STAGES[replica.phase], reason)
    close(turn, replica, reason)


def let_go(turn: Turn, rank: Rank) -> None:
    """The rank is out of every group: free it from its closed epoch."""
    rank.aborting = rank.let_go_by = None
    if rank.pid:
        rank.phase = RankPhase.IDLE
    holder = turn.state.replicas.get(rank.replica)
    if holder is not None and holder.phase not in OPEN:
        rank.unbind()
        end_if_free(turn, holder)


def end_if_free(turn: Turn, replica: Replica) -> None:
    """Once no rank is bound to a closed epoch, answer who asked for its end, and forget it."""
    if replica.phase in OPEN or replica.ending is None or ranks_of(turn, replica):
        return
    answer(turn, replica.replica, replica.epoch, replica.ending)
    replica.ending = None
    if turn.state.replicas.get(replica.replica) is replica:
        del turn.state.replicas[replica.replica]


def ranks_of(turn: Turn, replica: Replica) -> list[Rank]:
    """This node's ranks that are bound to the epoch, lowest number first."""
    key = (replica.replica, replica.epoch)
    bound = [rank for rank in turn.state.ranks.values() if (rank.replica, rank.epoch) == key]
    return sorted(bound, key=lambda rank: rank.rank)


def suspects_of(replica: Replica) -> frozenset[SequenceId]:
    """The sequences of the steps that began and did not end."""
    return frozenset(SequenceId(sequence) for step in replica.steps.values() for sequence in step)


def answer(
    turn: Turn,
    name: ReplicaId,
    epoch: Epoch,
    phase: GroupPhase,
    reason: Reason | None = None,
    replica: Replica | None = None,
) -> None:
    """Tell the leader how a stage or an ending came out; it is well without a reason."""
    tell(
        turn,
        GroupState(
            replica=name,
            epoch=epoch,
            phase=phase,
            ok=reason is None,
            reason=reason,
            rendezvous=replica.rendezvous if replica is not None and phase is GroupPhase.PREPARED else "",
            capacity=replica.capacity if replica is not None and phase is GroupPhase.LOADED else None,
        ),
    )


def kill_rank(turn: Turn, rank: Rank, reason: Reason) -> None:
    """End its process by force. A no-op for one that was killed already."""
    if rank.killed is None and rank.pid:
        rank.killed = reason
        details = {"device": rank.device, "pid": str(rank.pid)}
        turn.emit(Recorded("rank_killed", rank.replica, rank.epoch, reason=reason, details=details))
        turn.emit(KillRank(rank.device, rank.pid, reason))


def kill_if_spoilt(turn: Turn, rank: Rank, reason: Reason) -> None:
    """After an error of its device a process can make no use of it any more (CUDA keeps the error): a fresh one may."""
    if reason.kind is ReasonKind.DEVICE_SICK:
        kill_rank(turn, rank, reason)


def kill_holders(turn: Turn) -> None:
    """Kill who did not let go in time."""
    overdue = [rank for rank in turn.state.ranks.values() if rank.let_go_by is not None and turn.now >= rank.let_go_by]
    groups: dict[tuple[ReplicaId, Epoch], list[Rank]] = defaultdict(list)
    for rank in overdue:
        if rank.aborting is None or rank.leaving:
            _kill_holder(turn, rank, "did not exit in time")
        else:
            groups[rank.aborting].append(rank)
    for group in groups.values():
        _kill_holder_of(turn, group)


def _kill_holder_of(turn: Turn, group: list[Rank]) -> None:
    """Stopped processes first, else the one at the lowest collective: the others wait for it, and get as long again."""
    stopped = [rank for rank in group if _is_stopped(rank)]
    victims = stopped or [min(group, key=_collective)]
    for rank in group:
        if rank in victims:
            _kill_holder(turn, rank, "did not leave its group in time")
        else:
            rank.let_go_by = turn.now + turn.state.timings.collective_timeout


def _kill_holder(turn: Turn, rank: Rank, text: str) -> None:
    rank.let_go_by = None
    reason = Reason(
        kind=ReasonKind.NO_PROGRESS,
        text=f"{_who(rank)} {text} (process state {_process_state(rank) or 'unknown'})",
        node=turn.state.identity.node,
        rank=rank.rank,
        group=rank.aborting[0] if rank.aborting else rank.replica,
        collective=_collective(rank),
    )
    kill_rank(turn, rank, reason)


def _who(rank: Rank) -> str:
    """It, and how far it came: ranks that wait for it entered one more."""
    if rank.aborting is None:
        return rank.device
    return f"rank {rank.rank} of {rank.aborting[0]} on {rank.device}, in its exchange {_collective(rank)},"


def _is_stopped(rank: Rank) -> bool:
    return _process_state(rank) in ("T", "t")


def _collective(rank: Rank) -> int:
    return 0 if rank.sample is None else rank.sample.collective


def _process_state(rank: Rank) -> str:
    return "" if rank.sample is None else rank.sample.process_state


def _abort_rank(turn: Turn, replica: Replica, rank: Rank) -> None:
    """Tell a rank that its epoch is over; one that never heard of it has nothing to leave."""
    if rank.device in replica.prepare or rank.pid == 0:
        rank.unbind()
        return
    rank.aborting = (rank.replica, rank.epoch)
    timings = turn.state.timings
    # One that is stopped will not let go by itself.
    patience_s = timings.heartbeat_interval if _is_stopped(rank) else timings.collective_timeout
    rank.let_go_by = turn.now + patience_s
    turn.emit(MarkEpochsOver(rank.device, rank.epoch))
    turn.emit(SendRank(rank.device, frames.Abort(epoch=rank.epoch)))
