"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import structlog
from aiohttp import web
from pydantic import ValidationError

from controlplane.gateway.api_errors import ApiError, bad, from_error, from_validation
from controlplane.gateway.generation import Asked, Generation, Generator
from controlplane.gateway.openai import ChatRequest, CompletionRequest, GenerationRequest
from controlplane.gateway.params import wanted_chat, wanted_completion
from controlplane.gateway.render import (
    DONE,
    KEEPALIVE,
    Answer,
    ChatShape,
    CompletionShape,
    Echo,
    Shape,
    encode_json,
    event,
    gather,
)
from controlplane.gateway.text_stream import Piece
from controlplane.runtime.errors import PerdureError

R = TypeVar("R", bound=GenerationRequest)

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

log = structlog.get_logger()


class GenerateHandlers:
    """The two ways in for prompts."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._ignored: set[str] = set()

    async def completions(self, http: web.Request) -> web.StreamResponse:
        request = await self._parse(http, CompletionRequest)
        model, tokenizer = await self._generator.model(request.model)
        wanted = wanted_completion(request, self._generator.limits, tokenizer.vocab_size)
        try:
            prompts = await self._generator.completion_prompts(request, tokenizer)
        except PerdureError as error:
            raise from_error(error) from error
        created = int(time.time())
        asked = Asked(
            model=model,
            tokenizer=tokenizer,
            wanted=wanted,
            prompts=prompts,
            prompt_param="prompt",
            seed=request.seed,
            priority=request.priority,
            render=_render(request, "completion", created),
            echo=request.echo,
        )
        with self._generator.open(asked) as generation:
            shape = CompletionShape(
                f"cmpl-{generation.request}",
                created,
                model.name,
                tokenizer,
                logprobs=wanted.texts.logprobs,
                with_usage=request.include_usage,
            )
            return await _answer(http, request, generation, shape, len(prompts) * wanted.n)

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        request = await self._parse(http, ChatRequest)
        model, tokenizer = await self._generator.model(request.model)
        wanted = wanted_chat(request, self._generator.limits, tokenizer.vocab_size)
        try:
            prompt = await self._generator.chat_prompt(request, tokenizer)
        except PerdureError as error:
            raise from_error(error) from error
        created = int(time.time())
        asked = Asked(
            model=model,
            tokenizer=tokenizer,
            wanted=wanted,
            prompts=[prompt],
            prompt_param="messages",
            seed=request.seed,
            priority=request.priority,
            render=_render(request, "chat", created),
        )
        with self._generator.open(asked) as generation:
            shape = ChatShape(
                f"chatcmpl-{generation.request}",
                created,
                model.name,
                tokenizer,
                logprobs=wanted.texts.logprobs,
                with_usage=request.include_usage,
            )
            return await _answer(http, request, generation, shape, wanted.n)

    async def _parse(self, http: web.Request, kind: type[R]) -> R:
        if http.content_type != "application/json":
            raise ApiError(415, f"the body must be application/json, not {http.content_type}", code="unsupported_type")
        try:
            body = msgspec.json.decode(await http.read())
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise bad(None, f"the body is not valid JSON: {error}", code="invalid_json") from error
        if not isinstance(body, dict):
            raise bad(None, "the body must be a JSON object", code="invalid_json")
        try:
            request = kind.model_validate(body)
        except ValidationError as error:
            raise from_validation(error) from error
        self._note_ignored(request)
        return request

    def _note_ignored(self, request: GenerationRequest) -> None:
        new = set(request.model_extra or ()) - self._ignored
        if new and len(self._ignored) < 1000:
            self._ignored |= new
            log.warning("request_fields_ignored", fields=sorted(new))


async def _answer(
    http: web.Request, request: GenerationRequest, generation: Generation, shape: Shape, choices: int
) -> web.StreamResponse:
    if not request.stream:
        return await _whole(generation, shape, request.n, choices)
    pieces = await generation.feed.news()
    generation.check()
    response = web.StreamResponse(headers=_STREAM_HEADERS)
    await response.prepare(http)
    writer = _EventWriter(generation, shape, choices)
    while True:
        await response.write(writer.events(pieces) or KEEPALIVE)
        if generation.feed.over:
            break
        pieces = await generation.feed.news()
    await response.write(writer.ending(with_usage=request.include_usage))
    await response.write_eof()
    return response


class _EventWriter:
    """Pieces to events, a choice's opening before its first."""

    def __init__(self, generation: Generation, shape: Shape, choices: int) -> None:
        self._generation = generation
        self._shape = shape
        self._unopened = set(range(choices))

    def events(self, pieces: Sequence[Piece]) -> bytes:
        """All of them as one write."""
        written: list[bytes] = []
        for piece in pieces:
            if piece.choice in self._unopened:
                self._unopened.remove(piece.choice)
                written.append(self._shape.opening(piece.choice, self._generation.echo(piece.choice)))
            written.append(self._shape.piece(piece))
        return b"".join(written)

    def ending(self, *, with_usage: bool) -> bytes:
        """The end of the stream: usage, or what went wrong."""
        try:
            self._generation.check()
        except ApiError as error:
            return event(error.body()) + DONE
        usage = self._shape.usage(self._generation.usage()) if with_usage else b""
        return usage + DONE


async def _whole(generation: Generation, shape: Shape, n: int, choices: int) -> web.Response:
    answers: dict[int, Answer] = {}
    while not generation.feed.over:
        gather(await generation.feed.news(), answers)
    generation.check()
    echoes: list[Echo | None] = [generation.echo(choice) for choice in range(0, choices, n)]
    body = shape.whole(answers, echoes, n, generation.usage())
    return web.Response(body=body, content_type="application/json")


def _render(request: GenerationRequest, kind: str, created: int) -> dict[str, object]:
    return {"kind": kind, "created": created, "stream": request.stream, "include_usage": request.include_usage}


def error_response(error: ApiError) -> web.Response:
    """A refusal before anything was sent."""
    return web.Response(
        status=error.status, body=encode_json(error.body()), content_type="application/json", headers=error.headers()
    )
