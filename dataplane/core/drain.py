"""Draining: no new work, running streams finish or are moved; then the node is empty, or the daemon goes."""

from __future__ import annotations

from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.serve import WorkerDraining
from controlplane.runtime.messages.session import Drained, Leaving
from dataplane.core.cursors import send
from dataplane.core.messages import Depart, Recorded
from dataplane.core.shadows import lose, stop_sequences
from dataplane.core.state import Turn
from dataplane.core.terms import tell


def begin(turn: Turn, deadline_ms: int, reason: Reason) -> None:
    """Refuse new bodies from now on, and tell the gateways. A daemon that is to go keeps its own deadline."""
    state = turn.state
    if state.leaving is not None and state.draining:
        return
    state.draining, state.drained_told = True, False
    state.drain_deadline = turn.now + (deadline_ms / 1000 if deadline_ms else state.timings.drain)
    state.reservations.clear()
    turn.emit(Recorded("drain_begun", reason=reason))
    for stream in state.streams.values():
        send(turn, stream, WorkerDraining(deadline_ms=budget_ms(turn)))
    proceed(turn)


def undo(turn: Turn) -> None:
    """Take new work again, unless the daemon is to go."""
    state = turn.state
    if state.leaving is None and state.draining:
        state.draining, state.drained_told, state.drain_deadline = False, False, None
        state.heartbeat_due = True
        turn.emit(Recorded("drain_undone"))


def leave(turn: Turn, reason: Reason, deadline_ms: int = 0) -> None:
    """Drain, then go. `deadline_ms` 0: the default."""
    state = turn.state
    if state.leaving is not None:
        return
    state.leaving = reason
    deadline_ms = deadline_ms or round(state.timings.drain * 1000)
    tell(turn, Leaving(deadline_ms=deadline_ms, reason=reason))
    begin(turn, deadline_ms, reason)


def tell_again(turn: Turn) -> None:
    """A new leader hears of it too."""
    state = turn.state
    state.drained_told = False
    if state.leaving is not None:
        tell(turn, Leaving(deadline_ms=budget_ms(turn), reason=state.leaving))


def proceed(turn: Turn) -> None:
    """Say when the node is empty. Past the deadline of a leaving daemon, and a session's silence after that of a
    drained node whose leader did not move the rest, what still runs is given up for replay elsewhere."""
    state = turn.state
    if not state.draining or state.departed:
        return
    assert state.drain_deadline is not None, "a drain has a deadline"
    patience = 0.0 if state.leaving is not None else state.timings.session_silence
    if turn.now >= state.drain_deadline + patience:
        _give_up(turn)
    if _busy(turn):
        return
    if not state.drained_told:
        state.drained_told = True
        turn.emit(Recorded("drain_ended"))
        tell(turn, Drained())
    if state.leaving is not None:
        state.departed = True
        turn.emit(Depart())


def budget_ms(turn: Turn) -> int:
    """What is left of the drain's time, in milliseconds."""
    deadline = turn.state.drain_deadline
    return 0 if deadline is None else max(0, round((deadline - turn.now) * 1000))


def _busy(turn: Turn) -> bool:
    """True while something runs, or a gateway has not been sent all it is owed."""
    state = turn.state
    return bool(state.sequences) or any(stream.dirty or not stream.writable for stream in state.streams.values())


def _give_up(turn: Turn) -> None:
    """What still runs is lost here. A gateway that does not read holds nobody up any more."""
    state = turn.state
    reason = state.leaving or Reason(kind=ReasonKind.DRAINING, text="the drain's time is over")
    for replica in state.replicas.values():
        stop_sequences(turn, replica)
        lose(turn, replica, reason, frozenset())
    if state.leaving is not None:
        for stream in state.streams.values():
            stream.dirty.clear()
            stream.writable = True
