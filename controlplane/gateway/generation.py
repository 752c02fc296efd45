"""One API request as journals: prompts tokenised and checked, opened, their news gathered, and in the end closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from controlplane.gateway.api_errors import ApiError, bad, from_failure
from controlplane.gateway.chat_template import TemplateFailed
from controlplane.gateway.feed import Feed, JournalSink, prompt_infos
from controlplane.gateway.limits import GatewayLimits
from controlplane.gateway.messages import Failure, RequestAccepted
from controlplane.gateway.metrics import GatewayMetrics, RequestClock
from controlplane.gateway.models import Catalogue, ServedModel
from controlplane.gateway.openai import ChatRequest, CompletionRequest
from controlplane.gateway.params import Wanted, answer_tokens, choice_seeds
from controlplane.gateway.prefix import prefix_hashes
from controlplane.gateway.render import Echo, Usage
from controlplane.gateway.requests import Requests
from controlplane.gateway.text_stream import TextStream
from controlplane.gateway.tokenizer import ModelTokenizer, TokenizerPool
from controlplane.runtime.clock import Clock
from controlplane.runtime.ids import DeploymentId, RequestId, draw_id
from controlplane.runtime.packing import pack_u32

RENDER_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, ready for the engine; `text` as the client wrote it, None where it gave ids."""

    ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """All that opens the journals of one API request."""

    model: ServedModel
    tokenizer: ModelTokenizer
    wanted: Wanted
    prompts: list[Prompt]
    prompt_param: str
    seed: int | None = None
    priority: int = 0
    tenant: str = ""
    # What a gateway that resumes the stream must know to go on writing it.
    render: Mapping[str, Any] | None = None
    request: RequestId | None = None
    # Seconds; None: the gateway's own patience.
    deadline_s: float | None = None
    echo: bool = False


class Generation:
    """The journals of one API request and the feed of their news. Use as a context manager: leaving it frees them."""

    def __init__(
        self,
        feed: Feed,
        sinks: list[tuple[RequestId, JournalSink]],
        asked: Asked,
        requests: Requests,
        forget: Callable[[DeploymentId], None],
    ) -> None:
        self.feed = feed
        self._sinks = sinks
        self._asked = asked
        self._requests = requests
        self._forget = forget

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.feed.close()
        for request, sink in self._sinks:
            self._requests.leave(request, complete=sink.complete)

    @property
    def request(self) -> RequestId:
        """Id of the first journal, which names the response."""
        return self._sinks[0][0]

    def check(self) -> None:
        """Raise the response's failure as an ApiError, if there is one."""
        failed = self.feed.failure
        if failed is None:
            return
        if failed.failure == Failure.UNKNOWN_MODEL:
            self._forget(self._asked.model.deployment)
        raise from_failure(failed)

    def echo(self, choice: int) -> Echo | None:
        """The prompt that stands before a choice, if the client wants it there."""
        asked = self._asked
        if not asked.echo:
            return None
        place = choice // asked.wanted.n
        prompt = asked.prompts[place]
        text = prompt.text if prompt.text is not None else asked.tokenizer.decode(prompt.ids)
        if not asked.wanted.texts.logprobs:
            return Echo(text)
        known = self._sinks[place][1].prompt_logprobs
        return Echo(text, prompt_infos(prompt.ids, known, asked.tokenizer))

    def usage(self) -> Usage:
        asked = self._asked
        return Usage(
            prompt_tokens=sum(len(prompt.ids) for prompt in asked.prompts),
            completion_tokens=sum(sink.tokens for _, sink in self._sinks),
            cached_tokens=self.feed.cached_tokens,
        )


class Generator:
    """Opens generations. Shared by the HTTP and the gRPC edge."""

    def __init__(
        self,
        requests: Requests,
        catalogue: Catalogue,
        pool: TokenizerPool,
        limits: GatewayLimits,
        metrics: GatewayMetrics,
        clock: Clock,
    ) -> None:
        self._requests = requests
        self._catalogue = catalogue
        self._pool = pool
        self._limits = limits
        self._metrics = metrics
        self._clock = clock

    @property
    def limits(self) -> GatewayLimits:
        return self._limits

    async def model(self, name: str | None) -> tuple[ServedModel, ModelTokenizer]:
        """The model of that name with its tokenizer. Raises ApiError."""
        model = self._catalogue.find(name)
        return model, await self._catalogue.ready(model)

    async def completion_prompts(self, request: CompletionRequest, tokenizer: ModelTokenizer) -> list[Prompt]:
        """Raises ApiError, Retryable."""
        given = request.prompts()
        if not given:
            raise bad("prompt", "prompt must not be empty")
        if len(given) > self._limits.prompts_max:
            raise bad("prompt", f"at most {self._limits.prompts_max} prompts are allowed in one request")
        return [await self.prompt(one, tokenizer, special=request.add_special_tokens) for one in given]

    async def prompt(self, given: str | Sequence[int], tokenizer: ModelTokenizer, *, special: bool = True) -> Prompt:
        """One prompt, as text or ids. Raises ApiError, Retryable."""
        if isinstance(given, str):
            return Prompt(await self._pool.encode(tokenizer, given, add_special_tokens=special), given)
        if given and max(given) >= tokenizer.vocab_size:
            raise bad("prompt", f"token id {max(given)} is not in the vocabulary of {tokenizer.vocab_size}")
        return Prompt(list(given))

    async def chat_prompt(self, request: ChatRequest, tokenizer: ModelTokenizer) -> Prompt:
        """Raises ApiError, Retryable."""
        messages = [message.for_template() for message in request.messages]
        try:
            text = await self._pool.render_chat(
                tokenizer,
                messages,
                tools=request.tools if request.tool_choice != "none" else None,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                extra=request.chat_template_kwargs,
            )
        except TemplateFailed as error:
            raise bad("messages", f"the model's chat template refused the messages: {error}") from error
        # The template writes the special tokens itself.
        return Prompt(await self._pool.encode(tokenizer, text, add_special_tokens=False), text)

    def open(self, asked: Asked) -> Generation:
        """Open a journal for each prompt. Raises ApiError; nothing is open then."""
        model, wanted = asked.model, asked.wanted
        budgets = [
            answer_tokens(wanted, len(prompt.ids), model.context_tokens, asked.prompt_param) for prompt in asked.prompts
        ]
        self._check_room(asked)
        feed = Feed(self._limits.keepalive_s)
        sinks: list[tuple[RequestId, JournalSink]] = []
        generation = Generation(feed, sinks, asked, self._requests, self._catalogue.forget)
        for place, (prompt, budget) in enumerate(zip(asked.prompts, budgets, strict=True)):
            accepted = self._accepted(asked, prompt, budget, place)
            sink = self._sink(feed, asked, prompt, place * wanted.n, accepted.request)
            sinks.append((accepted.request, sink))
            self._metrics.prompt_tokens.inc(len(prompt.ids))
            self._metrics.prompt_length.observe(len(prompt.ids))
            self._requests.open(accepted, sink)
        return generation

    def _check_room(self, asked: Asked) -> None:
        if self._requests.open_requests + len(asked.prompts) > self._limits.open_requests_max:
            message = f"{self._limits.open_requests_max} requests are open at this gateway"
            raise ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=1)
        biggest = max(len(prompt.ids) for prompt in asked.prompts)
        if biggest > self._limits.journals.journal_tokens_max:
            raise ApiError(
                413, f"a prompt of {biggest} tokens is more than this gateway holds", param=asked.prompt_param
            )
        if asked.request is not None and self._requests.is_open(asked.request):
            raise bad("request", f"request {asked.request} is already open")

    def _accepted(self, asked: Asked, prompt: Prompt, budget: int, place: int) -> RequestAccepted:
        model = asked.model
        packed = pack_u32(prompt.ids)
        seeds = choice_seeds(asked.seed, asked.wanted.n)
        salt = asked.tenant
        patience = self._limits.request_deadline_s
        request = asked.request if asked.request is not None and place == 0 else RequestId(draw_id())
        return RequestAccepted(
            request=request,
            deployment=model.deployment,
            prompt=packed,
            sampling=replace(asked.wanted.sampling, max_tokens=budget, seed=seeds[0]),
            seeds=seeds,
            priority=asked.priority,
            tenant=asked.tenant,
            tenant_salt=salt,
            prefix_hashes=prefix_hashes(
                packed, model.block_tokens, salt=salt, model=model.model_path, numerics=model.numerics
            ),
            render=_render_blob(asked, place),
            deadline=self._clock.now() + min(patience, asked.deadline_s or patience),
        )

    def _sink(self, feed: Feed, asked: Asked, prompt: Prompt, first_choice: int, request: RequestId) -> JournalSink:
        offset = 0
        if asked.echo:
            offset = len(prompt.text) if prompt.text is not None else len(asked.tokenizer.decode(prompt.ids))
        texts = [
            TextStream(first_choice + choice, prompt.ids, asked.tokenizer, asked.wanted.texts, offset)
            for choice in range(asked.wanted.n)
        ]
        return JournalSink(request, feed, texts, RequestClock(self._metrics, self._clock), self._requests.stop_choice)


def _render_blob(asked: Asked, place: int) -> bytes:
    texts = asked.wanted.texts
    blob = msgspec.json.encode(
        {
            "version": 1,
            "place": place,
            "model": asked.model.name,
            "n": asked.wanted.n,
            "echo": asked.echo,
            "stops": texts.stops,
            "include_stop": texts.include_stop,
            "min_tokens": texts.min_tokens,
            "logprobs": texts.logprobs,
            **(asked.render or {}),
        }
    )
    if len(blob) > RENDER_BYTES_MAX:
        raise bad("stop", f"what describes the stream takes {len(blob)} bytes, at most {RENDER_BYTES_MAX} are allowed")
    return blob
