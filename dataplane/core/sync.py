"""Streams that come back, and requests that change hands: Sync by cursor, Resume with the shadow."""

from __future__ import annotations

from dataclasses import replace

from controlplane.runtime.ids import Attempt, Slot
from controlplane.runtime.messages import serve
from controlplane.runtime.messages.common import Reason, Sampling
from controlplane.runtime.messages.serve import (
    ResumeRequest,
    Shadow,
    SlotCursor,
    Superseded,
    SyncReply,
    SyncSlots,
)
from controlplane.runtime.packing import pack_u32
from dataplane.core.cursors import bind, flush, rewind, send, unbind
from dataplane.core.messages import Recorded
from dataplane.core.shadows import drop, orphan, tell_lost
from dataplane.core.state import Choice, Request, Stream, Turn


def sync(turn: Turn, stream: Stream, message: SyncSlots) -> None:
    """Go on from the gateway's cursors. What it no longer asks for and still runs is stopped."""
    asked = {cursor.request for cursor in message.slots}
    found = [cursor for cursor in message.slots if _find(turn, stream, cursor) is not None]
    known = frozenset(cursor.slot for cursor in found)
    unknown = tuple(cursor.slot for cursor in message.slots if cursor.slot not in known)
    send(turn, stream, SyncReply(known=tuple(cursor.slot for cursor in found), unknown=unknown))
    rebind(turn, stream, tuple(found))
    for request in list(turn.state.requests.values()):
        own = request.incarnation == stream.incarnation and request.stream is None and not request.handed
        if own and request.running and request.request not in asked:
            drop(turn, request)


def _find(turn: Turn, stream: Stream, cursor: SlotCursor) -> tuple[Request, Choice] | None:
    request = turn.state.requests.get(cursor.request)
    if request is None or request.attempt != cursor.attempt or request.incarnation != stream.incarnation:
        return None
    for choice in request.choices:
        if choice.index == cursor.choice and not choice.closed:
            return (request, choice) if choice.delivered <= cursor.next_index <= len(choice.tokens) else None
    return None


def rebind(turn: Turn, stream: Stream, cursors: tuple[SlotCursor, ...]) -> None:
    """Bind the cursors' choices to this stream, send what they lack, and tell of those that are lost."""
    lost: dict[bool, tuple[Reason, list[Slot]]] = {}
    for cursor in cursors:
        held = _find(turn, stream, cursor)
        if held is None:
            continue
        request, choice = held
        _adopt(turn, stream, request)
        unbind(stream, choice)
        rewind(choice, cursor.next_index)
        bind(stream, request, choice, cursor.slot)
        if request.lost is not None and not choice.done:
            lost.setdefault(request.suspect, (request.lost, []))[1].append(cursor.slot)
    for suspect, (reason, slots) in lost.items():
        tell_lost(turn, stream, slots, reason, suspect)
    flush(turn, stream)


def _adopt(turn: Turn, stream: Stream, request: Request) -> None:
    if request.stream is not None and request.stream != stream.stream:
        other = turn.state.streams[request.stream]
        for choice in request.choices:
            unbind(other, choice)
    request.stream, request.handed = stream.stream, False
    if request.lost is None:
        request.expires = None


def resume(turn: Turn, stream: Stream, message: ResumeRequest) -> None:
    """Another gateway takes the request over: it gets the shadow under the next attempt, and then syncs."""
    state = turn.state
    request = state.requests.get(message.request)
    if request is None:
        send(turn, stream, _missing(message))
        return
    attempt = Attempt(request.attempt + 1)
    if request.stream is not None:
        old = state.streams[request.stream]
        for choice in request.choices:
            unbind(old, choice)
        send(turn, old, Superseded(request=request.request, attempt=attempt))
    request.permit = replace(request.permit, attempt=attempt)
    request.gateway, request.incarnation, request.handed = stream.gateway, stream.incarnation, True
    # The shadow holds every token: the gateway may go on from any of them, also from one that an earlier attempt gave.
    for choice in request.choices:
        choice.delivered = 0
    orphan(turn, request)
    turn.emit(Recorded("request_resumed", request=request.request, details={"gateway": stream.gateway}))
    for chunk in _shadow(request, turn.now):
        send(turn, stream, chunk)


def _missing(message: ResumeRequest) -> Shadow:
    return Shadow(
        request=message.request, attempt=Attempt(0), prompt=b"", sampling=Sampling(), render=b"", missing=True
    )


def _shadow(request: Request, now: float) -> list[Shadow]:
    """The body first, then one chunk a choice with all its tokens from index 0."""
    body = Shadow(
        request=request.request,
        attempt=request.attempt,
        prompt=request.prompt,
        sampling=request.sampling,
        render=request.render,
        last=False,
        permit=request.permit,
        remaining_ms=max(1, round((request.deadline - now) * 1000)) if request.deadline is not None else 0,
        cached_tokens=request.cached_tokens,
    )
    choices = [
        serve.Choice(
            index=choice.index,
            slot=Slot(0),
            seed=choice.seed,
            delivered=pack_u32(choice.tokens),
            finished=choice.done,
        )
        for choice in request.choices
    ]
    count = len(choices)
    return [body] + [
        replace(body, prompt=b"", render=b"", permit=None, choices=(choice,), last=index == count - 1)
        for index, choice in enumerate(choices)
    ]
