"""POST /v1/completions and /v1/chat/completions, and GET /v1/streams/{id} to go on with one of their streams."""

from __future__ import annotations

import time
from typing import TypeVar

import msgspec
import structlog
from aiohttp import web
from pydantic import ValidationError

from controlplane.gateway.api_errors import ApiError, bad, from_error, from_validation
from controlplane.gateway.cursor import Position, PositionInvalid, parse
from controlplane.gateway.generation import Asked, Generation, Generator
from controlplane.gateway.openai import ChatRequest, CompletionRequest, GenerationRequest
from controlplane.gateway.params import wanted_chat, wanted_completion
from controlplane.gateway.render import Answer, ChatShape, CompletionShape, Echo, Shape, encode_json, gather
from controlplane.gateway.resume import Resumer
from controlplane.gateway.sse import STREAM_HEADER, stream
from controlplane.runtime.errors import PerdureError
from controlplane.runtime.ids import RequestId, is_drawn_id

R = TypeVar("R", bound=GenerationRequest)

log = structlog.get_logger()


class GenerateHandlers:
    """The two ways in for prompts."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._resumer = Resumer(generator)
        self._ignored: set[str] = set()

    async def completions(self, http: web.Request) -> web.StreamResponse:
        request = await self._parse(http, CompletionRequest)
        model, tokenizer = await self._generator.model(request.model)
        wanted = wanted_completion(request, self._generator.limits, tokenizer.vocab_size)
        try:
            prompts = await self._generator.completion_prompts(request, tokenizer, model.context_tokens)
        except PerdureError as error:
            raise from_error(error) from error
        asked = Asked(
            model=model,
            tokenizer=tokenizer,
            wanted=wanted,
            prompts=prompts,
            prompt_param="prompt",
            seed=request.seed,
            priority=request.priority,
            kind="completion",
            created=int(time.time()),
            include_usage=request.include_usage,
            echo=request.echo,
        )
        return await self._answer(http, request, asked)

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        request = await self._parse(http, ChatRequest)
        model, tokenizer = await self._generator.model(request.model)
        wanted = wanted_chat(request, self._generator.limits, tokenizer.vocab_size)
        try:
            prompt = await self._generator.chat_prompt(request, tokenizer, model.context_tokens)
        except PerdureError as error:
            raise from_error(error) from error
        asked = Asked(
            model=model,
            tokenizer=tokenizer,
            wanted=wanted,
            prompts=[prompt],
            prompt_param="messages",
            seed=request.seed,
            priority=request.priority,
            kind="chat",
            created=int(time.time()),
            include_usage=request.include_usage,
        )
        return await self._answer(http, request, asked)

    async def resume(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/streams/{id}: go on after the event that Last-Event-ID names."""
        name = http.match_info["stream"]
        if not is_drawn_id(name):
            raise ApiError(404, f"{name!r} is no stream id: it is 32 lower-case hex digits", code="stream_not_found")
        last = http.headers.get("Last-Event-ID") or http.query.get("last_event_id", "")
        try:
            at = parse(last, RequestId(name)) if last else Position()
        except PositionInvalid as error:
            raise bad("last_event_id", str(error)) from error
        with await self._resumer.open(RequestId(name), at) as generation:
            usage = generation.asked.include_usage
            answer_s = self._generator.limits.answer_s
            return await stream(http, generation, _shape(generation), include_usage=usage, answer_s=answer_s, at=at)

    async def _answer(self, http: web.Request, request: GenerationRequest, asked: Asked) -> web.StreamResponse:
        with self._generator.open(asked) as generation:
            shape = _shape(generation)
            if not request.stream:
                return await _whole(generation, shape)
            answer_s = self._generator.limits.answer_s
            return await stream(http, generation, shape, include_usage=request.include_usage, answer_s=answer_s)

    async def _parse(self, http: web.Request, kind: type[R]) -> R:
        if http.content_type != "application/json":
            raise ApiError(415, f"the body must be application/json, not {http.content_type}", code="unsupported_type")
        try:
            body = msgspec.json.decode(await http.read())
        except web.RequestPayloadError as error:
            raise bad(None, "the body does not have its Content-Encoding", code="invalid_encoding") from error
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
        options = (request.stream_options.model_extra if request.stream_options is not None else None) or ()
        given = {*(request.model_extra or ()), *(f"stream_options.{name}" for name in options)}
        new = given - self._ignored
        if new and len(self._ignored) < 1000:
            self._ignored |= new
            log.warning("request_fields_ignored", fields=sorted(new))


def _shape(generation: Generation) -> Shape:
    """How the generation's kind of response is written."""
    asked = generation.asked
    chat = asked.kind == "chat"
    return (ChatShape if chat else CompletionShape)(
        f"{'chatcmpl' if chat else 'cmpl'}-{generation.request}",
        asked.created,
        asked.model.name,
        asked.tokenizer,
        logprobs=asked.wanted.texts.logprobs,
        with_usage=asked.include_usage,
    )


async def _whole(generation: Generation, shape: Shape) -> web.Response:
    answers: dict[int, Answer] = {}
    while not generation.feed.over:
        gather(await generation.feed.news(), answers)
    generation.check()
    n = generation.asked.wanted.n
    echoes: list[Echo | None] = [generation.echo(choice) for choice in range(0, generation.choices, n)]
    body = shape.whole(answers, echoes, n, generation.usage())
    headers = {STREAM_HEADER: generation.request}
    return web.Response(body=body, content_type="application/json", headers=headers)


def error_response(error: ApiError) -> web.Response:
    """A refusal before anything was sent."""
    return web.Response(
        status=error.status, body=encode_json(error.body()), content_type="application/json", headers=error.headers()
    )
