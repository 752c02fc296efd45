"""A generation as server-sent events. Each carries an id, from which any gateway can go on with the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp import web

from controlplane.gateway.api_errors import SERVER_ERROR, ApiError
from controlplane.gateway.cursor import Position, Writer
from controlplane.gateway.generation import Generation
from controlplane.gateway.render import CUT_OFF, DONE, KEEPALIVE, Shape, event
from controlplane.gateway.text_stream import Piece

STREAM_HEADER = "x-perdure-stream"
"""Names the stream that a response carries, for GET /v1/streams/{id}."""

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


async def stream(
    http: web.Request,
    generation: Generation,
    shape: Shape,
    *,
    include_usage: bool,
    answer_s: float,
    at: Position | None = None,
) -> web.StreamResponse:
    """Write events until the generation ends. `at`: where the client of a resumed stream is; what goes wrong is then an
    event, else it is raised as long as nothing was written. The status waits `answer_s` for the first token."""
    writer = EventWriter(generation, shape, at or Position())
    pieces: list[Piece] = []
    if at is None:
        pieces = await _first_news(generation, answer_s)
    response = web.StreamResponse(headers={**_HEADERS, STREAM_HEADER: generation.request})
    await response.prepare(http)
    if at is None:
        await response.write(writer.events(pieces) or _waiting(generation))
    while not generation.feed.over:
        pieces = await generation.feed.news()
        await response.write(writer.events(pieces) or _waiting(generation))
    await response.write(writer.ending(with_usage=include_usage))
    await response.write_eof()
    return response


async def _first_news(generation: Generation, answer_s: float) -> list[Piece]:
    """Raises ApiError for a generation that fails so soon, or that another gateway would begin sooner."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + answer_s
    pieces: list[Piece] = []
    while not pieces and not generation.feed.over and loop.time() < deadline:
        pieces = await generation.feed.news()
        generation.check()
        if not pieces and generation.apart:
            raise ApiError(
                503, "this gateway reaches no worker at present", kind=SERVER_ERROR, code="cut_off", retry_after_s=1
            )
    return pieces


def _waiting(generation: Generation) -> bytes:
    """What is written when there is nothing to say."""
    return CUT_OFF if generation.cut_off else KEEPALIVE


class EventWriter:
    """Pieces to events, a choice's opening before its first."""

    def __init__(self, generation: Generation, shape: Shape, at: Position) -> None:
        self._generation = generation
        self._shape = shape
        self._usage_seen = at.usage
        self._cursor = Writer(generation.request, generation.choices, at)

    def events(self, pieces: Sequence[Piece]) -> bytes:
        """All of them as one write."""
        written: list[bytes] = []
        for piece in pieces:
            if self._cursor.begin(piece.choice):
                opening = self._shape.opening(piece.choice, self._generation.echo(piece.choice))
                written += (self._cursor.line(), opening) if opening else ()
            shown = self._shape.piece(piece)
            finished = piece.finish is not None
            self._cursor.move(piece.choice, piece.first_index + len(piece.token_ids), finished=finished)
            written += (self._cursor.line(), shown) if shown else ()
        return b"".join(written)

    def ending(self, *, with_usage: bool) -> bytes:
        """The end of the stream: usage, or what went wrong."""
        try:
            self._generation.check()
        except ApiError as error:
            return event(error.body()) + DONE
        if not with_usage or self._usage_seen:
            return DONE
        return self._cursor.end_line() + self._shape.usage(self._generation.usage()) + DONE
