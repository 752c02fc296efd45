"""Bodies from gateways: admitted on their permit, cancelled, ended."""

from __future__ import annotations

from dataclasses import replace

from controlplane.runtime.messages import serve
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.serve import (
    Admitted,
    CancelSlots,
    EndRequests,
    FinishReason,
    OpenCode,
    OpenRefused,
    OpenRequest,
    SlotCursor,
)
from controlplane.runtime.packing import pack_u32, unpack_u32
from dataplane import frames
from dataplane.core.admission import TOKEN_BYTES, Refusal, judge
from dataplane.core.cursors import bind, flush, send, unbind
from dataplane.core.messages import Recorded, SendRank
from dataplane.core.shadows import drop, finish_choice, make_room, stop_choices
from dataplane.core.state import Choice, Request, Stream, Turn
from dataplane.core.sync import rebind
from dataplane.core.terms import see_term, tell_fenced
from dataplane.frames import SequenceId

CLOSED_SEQUENCE = SequenceId(0)
"""Stands where a choice was finished before it came here."""


def open_request(turn: Turn, stream: Stream, message: OpenRequest) -> None:
    """Admit the body on its permit, answer a second one of the same attempt alike, or refuse with the reason."""
    state, permit = turn.state, message.permit
    held = state.requests.get(permit.request)
    if held is not None and held.attempt == permit.attempt and held.incarnation == stream.incarnation:
        _open_again(turn, stream, held, message)
        return
    refusal = judge(state, stream, message)
    state.reservations.pop(permit.request, None)
    if refusal is None and not _room_for(turn, held, message):
        text = f"the daemon remembers {len(state.requests)} requests"
        refusal = OpenCode.FULL, Reason(kind=ReasonKind.OVERLOADED, text=text)
    if refusal is not None:
        _refuse(turn, stream, message, refusal)
        return
    see_term(turn, permit.term)
    _admit(turn, stream, message)


def _room_for(turn: Turn, held: Request | None, message: OpenRequest) -> bool:
    if held is not None:
        drop(turn, held)
    return make_room(turn, _bytes_held(message))


def _bytes_held(message: OpenRequest) -> int:
    return len(message.prompt) + len(message.render) + sum(len(choice.delivered) for choice in message.choices)


def _refuse(turn: Turn, stream: Stream, message: OpenRequest, refusal: Refusal) -> None:
    code, reason = refusal
    permit = message.permit
    if code in (OpenCode.STALE_TERM, OpenCode.STALE_EPOCH, OpenCode.DUPLICATE):
        tell_fenced(turn, message, permit.term, permit.epoch)
    turn.emit(Recorded("open_refused", permit.replica, permit.epoch, permit.request, reason, {"code": code.name}))
    send(turn, stream, OpenRefused(request=permit.request, attempt=permit.attempt, code=code, reason=reason))


def _open_again(turn: Turn, stream: Stream, held: Request, message: OpenRequest) -> None:
    """The same attempt once more: the first answer may have been lost. Its slots now live on this stream."""
    cursors = tuple(
        SlotCursor(
            slot=choice.slot,
            request=held.request,
            choice=choice.index,
            attempt=held.attempt,
            next_index=len(choice.delivered) // TOKEN_BYTES,
        )
        for choice in message.choices
        if not choice.finished
    )
    send(turn, stream, Admitted(request=held.request, attempt=held.attempt))
    rebind(turn, stream, cursors)


def _admit(turn: Turn, stream: Stream, message: OpenRequest) -> None:
    state, permit = turn.state, message.permit
    choices = [_new_choice(turn, choice) for choice in message.choices]
    request = Request(
        permit=permit,
        gateway=stream.gateway,
        incarnation=stream.incarnation,
        stream=stream.stream,
        prompt=message.prompt,
        sampling=message.sampling,
        render=message.render,
        choices=choices,
        bytes_held=_bytes_held(message),
        deadline=turn.now + message.remaining_ms / 1000 if message.remaining_ms else None,
    )
    state.requests[permit.request] = request
    state.shadow_bytes += request.bytes_held
    state.heartbeat_due = True
    send(turn, stream, Admitted(request=permit.request, attempt=permit.attempt))
    for choice in choices:
        if choice.closed:
            continue
        state.sequences[choice.sequence] = (request, choice)
        if len(choice.tokens) >= message.sampling.max_tokens:
            # All its tokens came with earlier attempts; only the finish was lost.
            finish_choice(turn, request, choice, FinishReason.LENGTH)
        bind(stream, request, choice, choice.slot)
    _submit(turn, request, message)
    flush(turn, stream)


def _new_choice(turn: Turn, choice: serve.Choice) -> Choice:
    tokens = unpack_u32(choice.delivered)
    sequence = CLOSED_SEQUENCE
    if not choice.finished:
        sequence = SequenceId(turn.state.next_sequence)
        turn.state.next_sequence += 1
    return Choice(
        index=choice.index,
        slot=choice.slot,
        sequence=sequence,
        tokens=tokens,
        delivered=len(tokens),
        sent=len(tokens),
        seed=choice.seed,
        closed=choice.finished,
    )


def _submit(turn: Turn, request: Request, message: OpenRequest) -> None:
    permit = request.permit
    running = [choice for choice in request.choices if choice.sequence in turn.state.sequences]
    if not running:
        return
    driver = turn.state.replicas[permit.replica].driver
    assert driver is not None, "admission looked for the driver"
    submissions = tuple(
        frames.Submission(
            sequence=choice.sequence,
            prompt=request.prompt,
            delivered=pack_u32(choice.tokens),
            sampling=replace(request.sampling, seed=choice.seed),
            priority=permit.priority,
            cache_salt=message.tenant_salt,
            allow_cached=message.allow_cached,
            solo=permit.solo,
            group=running[0].sequence,
        )
        for choice in running
    )
    turn.emit(SendRank(driver, frames.Submit(sequences=submissions)))


def cancel(turn: Turn, stream: Stream, message: CancelSlots) -> None:
    """Free the slots' sequences within a step. The shadow stays until its End."""
    state = turn.state
    stopped: dict[str, tuple[Request, list[Choice]]] = {}
    for slot in message.slots:
        held = stream.slots.get(slot)
        if held is None:
            state.fenced["CancelSlots"] += 1
            continue
        request, choice = held
        stopped.setdefault(request.request, (request, []))[1].append(choice)
    for request, choices in stopped.values():
        stop_choices(turn, request, choices)
        for choice in choices:
            unbind(stream, choice)
            choice.sent = len(choice.tokens)
            if not choice.done:
                finish_choice(turn, request, choice, FinishReason.CANCELLED)
            choice.finish_sent = True
    state.heartbeat_due = True


def end(turn: Turn, stream: Stream, message: EndRequests) -> None:
    """Free the requests with their shadows."""
    for name in message.requests:
        request = turn.state.requests.get(name)
        if request is not None and request.incarnation == stream.incarnation:
            drop(turn, request)
    turn.state.heartbeat_due = True
