"""Terms: who leads, the fence against who led before, and frames to the one that leads."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.runtime.ids import Epoch, RequestId, Term
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.session import AttachDown, AttachUp, Fenced, RankState
from dataplane.core.messages import HintLeader, LeaveLeader, SendLeader
from dataplane.core.state import Rank, Turn


def see_term(turn: Turn, term: Term, address: str = "") -> None:
    """Someone spoke of `term`. A higher one than ours ends the session of the term before it."""
    state = turn.state
    if term <= state.highest_term:
        return
    raise_term(turn, term)
    if address:
        state.leader_address = address
        turn.emit(HintLeader(address, term))
    leader = state.leader
    if leader is not None and leader.session is not None and leader.term < term:
        reason = Reason(kind=ReasonKind.STALE_TERM, text=f"term {leader.term} was followed by {term}")
        turn.emit(LeaveLeader(leader.link, reason, term, address))
        state.leader = None


def raise_term(turn: Turn, term: Term) -> None:
    """A new term drops all reservations that have no body: its leader mints permits of its own."""
    if term > turn.state.highest_term:
        turn.state.highest_term = term
        turn.state.reservations.clear()


def tell(turn: Turn, body: AttachUp) -> None:
    """Send to the leader of a live session. Without one nothing is kept: the next session's Snapshot says it all."""
    leader = turn.state.leader
    if leader is not None and leader.session is not None:
        turn.emit(SendLeader(leader.link, body))


def tell_rank(turn: Turn, rank: Rank, reason: Reason | None = None, suspects: Iterable[RequestId] = ()) -> None:
    """Tell the leader how the rank stands."""
    tell(turn, rank_state(rank, reason, suspects))


def rank_state(rank: Rank, reason: Reason | None = None, suspects: Iterable[RequestId] = ()) -> RankState:
    """How the rank stands, for the leader."""
    return RankState(
        device=rank.device,
        pid=rank.pid,
        replica=rank.replica,
        epoch=rank.epoch,
        rank=rank.rank,
        phase=rank.phase,
        reason=reason,
        suspects=tuple(suspects),
    )


def fence_term(turn: Turn, message: AttachDown, term: Term) -> None:
    """Refuse a frame of an old term: count it, and say so."""
    _fence(turn, message, term, Epoch(0))


def fence_epoch(turn: Turn, message: AttachDown, epoch: Epoch) -> None:
    """Refuse a frame about an old epoch: count it, and say so."""
    _fence(turn, message, Term(0), epoch)


def tell_fenced(turn: Turn, message: object, term: Term, epoch: Epoch) -> None:
    """Count a refused frame of anyone, and tell the leader of it."""
    tell(turn, _count_fenced(turn, message, term, epoch))


def _fence(turn: Turn, message: AttachDown, term: Term, epoch: Epoch) -> None:
    body = _count_fenced(turn, message, term, epoch)
    # Whoever sent it is told, with or without a session.
    if turn.state.leader is not None:
        turn.emit(SendLeader(turn.state.leader.link, body))


def _count_fenced(turn: Turn, message: object, term: Term, epoch: Epoch) -> Fenced:
    frame = type(message).__name__
    turn.state.fenced[frame] += 1
    return Fenced(frame=frame, seen_term=term, seen_epoch=epoch, highest_term=turn.state.highest_term)
