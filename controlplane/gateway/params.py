"""From a request's fields to what the engine takes. Every refusal names its parameter."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.gateway.api_errors import CONTEXT_CODE, ApiError, bad
from controlplane.gateway.limits import GatewayLimits
from controlplane.gateway.openai import ChatRequest, CompletionRequest, GenerationRequest
from controlplane.gateway.text_stream import TextOptions
from controlplane.runtime.messages.common import Sampling

SEED_BITS = 64
_MASK = 2**SEED_BITS - 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checked request, before its prompts' lengths are known."""

    sampling: Sampling
    texts: TextOptions
    # None: as many as the context allows.
    max_tokens: int | None
    # Name of the parameter that gave max_tokens.
    max_tokens_param: str
    n: int


def wanted_completion(request: CompletionRequest, limits: GatewayLimits, vocab_size: int) -> Wanted:
    """Raises ApiError."""
    if request.best_of is not None and request.best_of != request.n:
        raise bad("best_of", "best_of must equal n: answers are not ranked")
    if request.logprobs is not None and request.logprobs > limits.logprobs_max:
        raise bad("logprobs", f"logprobs must be at most {limits.logprobs_max}")
    prompt_only = request.max_tokens == 0 and request.echo
    if request.max_tokens == 0 and not request.echo:
        raise bad("max_tokens", "max_tokens must be at least 1 without echo")
    prompt_logprobs = request.logprobs if request.echo else None
    sampling = _sampling(request, vocab_size, request.logprobs, prompt_logprobs)
    texts = _texts(request, limits, logprobs=request.logprobs is not None, prompt_only=prompt_only)
    max_tokens = 1 if prompt_only else request.max_tokens
    return _checked(Wanted(sampling, texts, max_tokens, "max_tokens", request.n), request, limits)


def wanted_chat(request: ChatRequest, limits: GatewayLimits, vocab_size: int) -> Wanted:
    """Raises ApiError."""
    logprobs = None
    if request.logprobs:
        logprobs = request.top_logprobs or 0
        if logprobs > limits.logprobs_max:
            raise bad("top_logprobs", f"top_logprobs must be at most {limits.logprobs_max}")
    elif request.top_logprobs:
        raise bad("top_logprobs", "top_logprobs needs logprobs to be true")
    if request.continue_final_message and request.add_generation_prompt:
        raise bad("continue_final_message", "continue_final_message needs add_generation_prompt to be false")
    param = "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens"
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    if max_tokens == 0:
        raise bad(param, f"{param} must be at least 1")
    sampling = _sampling(request, vocab_size, logprobs, None)
    texts = _texts(request, limits, logprobs=logprobs is not None)
    return _checked(Wanted(sampling, texts, max_tokens, param, request.n), request, limits)


def answer_tokens(wanted: Wanted, prompt_tokens: int, context_tokens: int, prompt_param: str) -> int:
    """How many tokens the answer may have. Raises ApiError as vLLM does: a prompt that fills the context and a
    max_tokens that goes past it are both refused, never cut."""
    if prompt_tokens == 0:
        raise bad(prompt_param, f"{prompt_param} must not be empty")
    if not context_tokens:
        return wanted.max_tokens if wanted.max_tokens is not None else 2**16
    room = context_tokens - prompt_tokens
    if room < 1:
        raise context_full(prompt_param, str(prompt_tokens), context_tokens)
    if wanted.max_tokens is None:
        return room
    if wanted.max_tokens > room:
        name = wanted.max_tokens_param
        limit = _context_limit(context_tokens)
        message = f"{name} is too large: {wanted.max_tokens}; {limit} and the prompt has {prompt_tokens} of them"
        raise bad(name, message, CONTEXT_CODE)
    if wanted.sampling.min_tokens > wanted.max_tokens:
        raise bad("min_tokens", "min_tokens must not exceed max_tokens")
    return wanted.max_tokens


def context_full(prompt_param: str, prompt_tokens: str, context_tokens: int) -> ApiError:
    """A prompt leaves no room for an answer; `prompt_tokens` says how many it has."""
    message = f"{_context_limit(context_tokens)}, but the {prompt_param} has {prompt_tokens}; please reduce its length"
    return bad(prompt_param, message, CONTEXT_CODE)


def _context_limit(context_tokens: int) -> str:
    return f"this model's maximum context length is {context_tokens} tokens"


def check_ids(where: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises ApiError naming the first id that is no token's. `where`: the list, as its client wrote it."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    index = next(index for index, token in enumerate(ids) if not 0 <= token < vocab_size)
    text = f"token id {ids[index]} is not in the vocabulary, whose ids are 0 to {vocab_size - 1}"
    raise bad(where.partition("[")[0], f"{where}[{index}]: {text}")


def choice_seeds(seed: int | None, n: int) -> tuple[int, ...]:
    """One seed a choice: the client's own, or one drawn now, for the first; the others are mixed from it."""
    first = secrets.randbits(SEED_BITS) if seed is None else seed & _MASK
    return tuple(first if choice == 0 else mixed_seed(first, choice) for choice in range(n))


def mixed_seed(seed: int, choice: int) -> int:
    """SplitMix64's output function (Steele, Lea, Flood 2014) at step `choice` from `seed`."""
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def _sampling(
    request: GenerationRequest, vocab_size: int, logprobs: int | None, prompt_logprobs: int | None
) -> Sampling:
    check_ids("stop_token_ids", request.stop_token_ids or (), vocab_size)
    for token in request.logit_bias or ():
        if token >= vocab_size:
            raise bad("logit_bias", f"token id {token} is not in the vocabulary, whose ids are 0 to {vocab_size - 1}")
    return Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop_ids=tuple(request.stop_token_ids or ()),
        logit_bias=request.logit_bias or {},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _texts(
    request: GenerationRequest, limits: GatewayLimits, *, logprobs: bool, prompt_only: bool = False
) -> TextOptions:
    stops = request.stops
    if len(stops) > limits.stops_max:
        raise bad("stop", f"at most {limits.stops_max} stop strings are allowed")
    if any(len(stop) > limits.stop_chars_max for stop in stops):
        raise bad("stop", f"a stop string may have at most {limits.stop_chars_max} characters")
    return TextOptions(
        stops=stops,
        include_stop=request.include_stop_str_in_output,
        min_tokens=request.min_tokens,
        logprobs=logprobs,
        prompt_only=prompt_only,
    )


def _checked(wanted: Wanted, request: GenerationRequest, limits: GatewayLimits) -> Wanted:
    if wanted.n > limits.choices_max:
        raise bad("n", f"n must be at most {limits.choices_max}")
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options", "stream_options is only allowed when stream is true")
    return wanted
