"""Requests that the daemon holds: their sequences' start, end and loss, and the bound on what it remembers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from controlplane.runtime.ids import Slot
from controlplane.runtime.messages.common import Reason
from controlplane.runtime.messages.serve import FinishReason, SlotsLost
from controlplane.runtime.messages.session import SequencePhase
from dataplane import frames
from dataplane.core.cursors import flush_all, send, unbind
from dataplane.core.messages import Recorded, SendRank, StreamId
from dataplane.core.state import Choice, Replica, Request, Stream, Turn
from dataplane.frames import SequenceId


def finish_choice(
    turn: Turn,
    request: Request,
    choice: Choice,
    reason: FinishReason,
    stop_id: int | None = None,
    error: Reason | None = None,
) -> None:
    """The choice has its last token. The caller marks its stream."""
    choice.finish, choice.stop_id, choice.error = reason, stop_id, error
    turn.state.sequences.pop(choice.sequence, None)
    if all(other.done for other in request.choices):
        request.phase = SequencePhase.FINISHED


def stop_choices(turn: Turn, request: Request, choices: Iterable[Choice]) -> None:
    """Free the sequences of these choices at their engine, within a step."""
    state = turn.state
    stopped = [choice.sequence for choice in choices if state.sequences.pop(choice.sequence, None) is not None]
    replica = state.replicas.get(request.permit.replica)
    if stopped and replica is not None and replica.driver is not None:
        turn.emit(SendRank(replica.driver, frames.Cancel(sequences=tuple(stopped))))


def stop_sequences(turn: Turn, replica: Replica) -> None:
    """Free all that runs on the replica at its engine; the caller says what becomes of the requests."""
    held = turn.state.sequences.items()
    stopped = tuple(sequence for sequence, (request, _) in held if request.permit.replica == replica.replica)
    if stopped and replica.driver is not None:
        turn.emit(SendRank(replica.driver, frames.Cancel(sequences=stopped)))


def drop(turn: Turn, request: Request) -> None:
    """Forget the request, stopping what still runs."""
    state = turn.state
    stop_choices(turn, request, request.choices)
    if request.stream is not None:
        stream = state.streams[request.stream]
        for choice in request.choices:
            unbind(stream, choice)
    del state.requests[request.request]
    state.shadow_bytes -= request.bytes_held


def orphan(turn: Turn, request: Request) -> None:
    """Its gateway's stream is gone: it computes on, and is dropped if nobody comes for it in time."""
    request.stream = None
    if request.expires is None:
        request.expires = turn.now + turn.state.timings.resume_grace


def make_room(turn: Turn, bytes_needed: int) -> bool:
    """Drop the oldest shadows that no gateway holds until the bound allows one more; False if that is not enough."""
    state, limits = turn.state, turn.state.limits

    def fits() -> bool:
        return len(state.requests) < limits.shadows and state.shadow_bytes + bytes_needed <= limits.shadow_bytes

    if fits():
        return True
    for request in [request for request in state.requests.values() if request.stream is None]:
        turn.emit(Recorded("shadow_dropped", request=request.request))
        drop(turn, request)
        if fits():
            return True
    return False


def lose(turn: Turn, replica: Replica, reason: Reason, suspects: frozenset[SequenceId]) -> None:
    """The replica epoch is over: its running requests are lost here, and their gateways told. Shadows stay for a
    grace period."""
    told: dict[tuple[StreamId, bool], list[Slot]] = defaultdict(list)
    for request in list(turn.state.requests.values()):
        permit = request.permit
        if not request.running or (permit.replica, permit.epoch) != (replica.replica, replica.epoch):
            continue
        request.suspect = any(choice.sequence in suspects for choice in request.choices)
        request.phase, request.lost = SequencePhase.LOST, reason
        request.expires = turn.now + turn.state.timings.resume_grace
        slots = _drop_sequences(turn, request)
        if request.stream is not None:
            told[request.stream, request.suspect].extend(slots)
    for (stream, suspect), slots in told.items():
        tell_lost(turn, turn.state.streams[stream], slots, reason, suspect)


def tell_lost(turn: Turn, stream: Stream, slots: list[Slot], reason: Reason, suspect: bool) -> None:
    """SlotsLost after the last tokens that there are; the slots are dead then."""
    flush_all(turn, stream)
    for slot in slots:
        unbind(stream, stream.slots[slot][1])
    send(turn, stream, SlotsLost(slots=tuple(slots), reason=reason, suspect=suspect))


def _drop_sequences(turn: Turn, request: Request) -> list[Slot]:
    unfinished = [choice for choice in request.choices if not choice.done]
    for choice in unfinished:
        del turn.state.sequences[choice.sequence]
    return [choice.slot for choice in unfinished]
