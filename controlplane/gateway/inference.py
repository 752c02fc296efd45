"""Servicer of Inference: the same journals, token by token, for programs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from pydantic import ValidationError

from controlplane.gateway.api_errors import ApiError, bad, from_error, from_validation
from controlplane.gateway.cursor import Position, Seen
from controlplane.gateway.generation import Asked, Generation, Generator
from controlplane.gateway.openai import CompletionRequest
from controlplane.gateway.params import wanted_completion
from controlplane.gateway.resume import Resumer
from controlplane.gateway.text_stream import Piece, TokenInfo
from controlplane.runtime.errors import PerdureError
from controlplane.runtime.ids import RequestId, is_drawn_id
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.packing import pack_f32, pack_u32
from protos.perdure.v1 import inference_pb2, inference_pb2_grpc, serve_pb2

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ABORTED,
    410: grpc.StatusCode.DATA_LOSS,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_FINISHES = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Generate and Resume: one call, one journal."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._resumer = Resumer(generator)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            with await self._open(request, context.time_remaining()) as generation:
                async for response in _responses(generation):
                    yield response
        except ApiError as error:
            await _abort(context, error)

    async def Resume(
        self, request: inference_pb2.InferenceResumeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.InferenceResumeResponse]:
        try:
            if not is_drawn_id(request.request):
                raise bad("request", "a request id is 32 lower-case hex digits")
            had = (Seen(True, choice.tokens, choice.finished) for choice in request.choices)
            with await self._resumer.open(RequestId(request.request), Position(tuple(had))) as generation:
                async for response in _responses(generation):
                    yield inference_pb2.InferenceResumeResponse(event=response)
        except ApiError as error:
            await _abort(context, error)

    async def _open(self, request: inference_pb2.GenerateRequest, remaining_s: float | None) -> Generation:
        asked = parse(request)
        model, tokenizer = await self._generator.model(request.model or None)
        wanted = wanted_completion(asked, self._generator.limits, tokenizer.vocab_size)
        given = request.prompt if request.prompt else list(request.prompt_ids)
        try:
            prompt = await self._generator.prompt(given, tokenizer, model.context_tokens, "prompt_ids")
        except PerdureError as error:
            raise from_error(error) from error
        return self._generator.open(
            Asked(
                model=model,
                tokenizer=tokenizer,
                wanted=wanted,
                prompts=[prompt],
                prompt_param="prompt",
                # As the proto says, zero asks for a drawn one.
                seed=asked.seed or None,
                priority=request.priority,
                tenant=request.tenant,
                kind="grpc",
                request=RequestId(request.request) if request.request else None,
                deadline_s=remaining_s,
            )
        )


def add_inference(server: grpc.aio.Server, generator: Generator) -> None:
    """Serve Inference on `server`."""
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(generator), server)


def parse(request: inference_pb2.GenerateRequest) -> CompletionRequest:
    """The request under the checks of the HTTP API, whose field names it shares. Raises ApiError."""
    if bool(request.prompt) == bool(request.prompt_ids):
        raise bad("prompt", "exactly one of prompt and prompt_ids must be given")
    if request.request and not is_drawn_id(request.request):
        raise bad("request", "a request id is 32 lower-case hex digits")
    options = request.sampling
    given = {field.name: value for field, value in options.ListFields()}
    if "stop_ids" in given:
        given["stop_token_ids"] = list(given.pop("stop_ids"))
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    try:
        return CompletionRequest.model_validate(
            {**given, "prompt": request.prompt, "n": request.n or 1, "stop": list(request.stop)}
        )
    except ValidationError as error:
        raise from_validation(error) from error


async def _responses(generation: Generation) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """The generation's news to its end. Raises ApiError."""
    while not generation.feed.over:
        pieces = await generation.feed.news()
        last = len(pieces) - 1 if generation.feed.open_choices == 0 else None
        for place, piece in enumerate(pieces):
            yield _response(generation, piece, last=place == last)
    generation.check()


def _response(generation: Generation, piece: Piece, *, last: bool) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(
        request=generation.request,
        choice=piece.choice,
        first_index=piece.first_index,
        token_ids=piece.token_ids,
        text=piece.text,
        logprobs=[_logprobs(info, piece.first_index + place) for place, info in enumerate(piece.infos)],
    )
    if piece.finish is not None:
        response.finish_reason = _FINISHES[piece.finish].value  # pyright: ignore[reportAttributeAccessIssue]
    if last:
        usage = generation.usage()
        response.usage.prompt_tokens = usage.prompt_tokens
        response.usage.completion_tokens = usage.completion_tokens
        response.usage.cached_tokens = usage.cached_tokens
    return response


def _logprobs(info: TokenInfo, index: int) -> serve_pb2.TokenLogprobs:
    return serve_pb2.TokenLogprobs(
        index=index,
        chosen=info.logprob or 0.0,
        top_ids=pack_u32(token for token, _ in info.top),
        top_values=pack_f32(logprob for _, logprob in info.top),
    )


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: ApiError) -> None:
    """End the call with the error's status; a retry delay travels as google.rpc.RetryInfo."""
    code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
    status = status_pb2.Status(code=code.value[0], message=error.message)
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=error.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, error.message, trailers)
