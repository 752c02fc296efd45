"""One API request as journals: prompts tokenised and checked, opened, their news gathered, and in the end closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from controlplane.gateway.api_errors import ApiError, bad, from_failure
from controlplane.gateway.chat_template import TemplateFailed
from controlplane.gateway.feed import Feed, JournalSink, prompt_infos
from controlplane.gateway.limits import GatewayLimits
from controlplane.gateway.messages import Failure, RequestAccepted
from controlplane.gateway.metrics import GatewayMetrics, RequestClock
from controlplane.gateway.models import Catalogue, ServedModel
from controlplane.gateway.openai import ChatRequest, CompletionRequest
from controlplane.gateway.params import Wanted, answer_tokens, check_ids, choice_seeds, context_full
from controlplane.gateway.prefix import prefix_hashes
from controlplane.gateway.render import Echo, Usage
from controlplane.gateway.render_blob import RENDER_BYTES_MAX, Kind, RenderBlob, place_id
from controlplane.gateway.requests import Requests
from controlplane.gateway.text_stream import TextStream
from controlplane.gateway.tokenizer import ModelTokenizer, TextTooLong, TokenizerPool
from controlplane.runtime.clock import Clock
from controlplane.runtime.ids import DeploymentId, RequestId, draw_id
from controlplane.runtime.packing import pack_u32

ECHOED_CHARS_MAX = 16 * 1024
"""Longer prompts are echoed by a gateway that resumes the stream as their tokens read, which may differ in spaces."""


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
    kind: Kind = "completion"
    # Wall clock, seconds.
    created: int = 0
    include_usage: bool = False
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

    @property
    def cut_off(self) -> bool:
        """This gateway reaches none of the workers that serve."""
        return self._requests.cut_off

    @property
    def apart(self) -> bool:
        """It has been so for long, and others may reach them."""
        return self._requests.apart

    @property
    def asked(self) -> Asked:
        return self._asked

    @property
    def choices(self) -> int:
        """Choices of all prompts."""
        return len(self._asked.prompts) * self._asked.wanted.n

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
        self.requests = requests
        self.limits = limits
        self.metrics = metrics
        self.clock = clock
        self._catalogue = catalogue
        self._pool = pool

    async def model(self, name: str | None) -> tuple[ServedModel, ModelTokenizer]:
        """The model of that name with its tokenizer. Raises ApiError."""
        model = self._catalogue.find(name)
        return model, await self._catalogue.ready(model)

    async def model_begun(
        self, name: str, deployment: DeploymentId, model_path: str
    ) -> tuple[ServedModel, ModelTokenizer]:
        """The model with which a stream began. Raises ApiError."""
        model = self._catalogue.begun(name, deployment, model_path)
        return model, await self._catalogue.ready(model)

    async def completion_prompts(
        self, request: CompletionRequest, tokenizer: ModelTokenizer, context_tokens: int
    ) -> list[Prompt]:
        """Raises ApiError, Retryable."""
        given = request.prompts()
        if not given:
            raise bad("prompt", "prompt must not be empty")
        if len(given) > self.limits.prompts_max:
            raise bad("prompt", f"at most {self.limits.prompts_max} prompts are allowed in one request")
        alone = given == [request.prompt]
        special = request.add_special_tokens
        return [
            await self.prompt(one, tokenizer, context_tokens, "prompt" if alone else f"prompt[{place}]", special)
            for place, one in enumerate(given)
        ]

    async def prompt(
        self,
        given: str | Sequence[int],
        tokenizer: ModelTokenizer,
        context_tokens: int,
        where: str,
        special: bool = True,
    ) -> Prompt:
        """One prompt, as text or ids; `where` ids stood in the request. Raises ApiError, Retryable."""
        if isinstance(given, str):
            return await self._tokenised(given, tokenizer, context_tokens, "prompt", special=special)
        check_ids(where, given, tokenizer.vocab_size)
        return Prompt(list(given))

    async def chat_prompt(self, request: ChatRequest, tokenizer: ModelTokenizer, context_tokens: int) -> Prompt:
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
        return await self._tokenised(text, tokenizer, context_tokens, "messages", special=False)

    async def _tokenised(
        self, text: str, tokenizer: ModelTokenizer, context_tokens: int, param: str, *, special: bool
    ) -> Prompt:
        # The answer needs room for a token. Without a known context there is no limit.
        tokens_max = max(context_tokens - 1, 0)
        try:
            ids = await self._pool.encode(tokenizer, text, add_special_tokens=special, tokens_max=tokens_max)
        except TextTooLong as error:
            raise context_full(param, f"at least {error.tokens_min}", context_tokens) from error
        return Prompt(ids, text)

    def open(self, asked: Asked) -> Generation:
        """Open a journal for each prompt. Raises ApiError; nothing is open then."""
        model, wanted = asked.model, asked.wanted
        budgets = [
            answer_tokens(wanted, len(prompt.ids), model.context_tokens, asked.prompt_param) for prompt in asked.prompts
        ]
        self._check_room(asked)
        feed = Feed(self.limits.keepalive_s)
        sinks: list[tuple[RequestId, JournalSink]] = []
        generation = self.generation(feed, sinks, asked)
        stream = asked.request or RequestId(draw_id())
        for place, (prompt, budget) in enumerate(zip(asked.prompts, budgets, strict=True)):
            accepted = self._accepted(asked, prompt, budget, place, place_id(stream, place))
            clock = RequestClock(self.metrics, self.clock)
            sink = JournalSink(accepted.request, feed, self.texts(asked, place), clock, self.requests.stop_choice)
            sinks.append((accepted.request, sink))
            self.metrics.prompt_tokens.inc(len(prompt.ids))
            self.metrics.prompt_length.observe(len(prompt.ids))
            self.requests.open(accepted, sink)
        return generation

    def generation(self, feed: Feed, sinks: list[tuple[RequestId, JournalSink]], asked: Asked) -> Generation:
        """A generation over journals that are still to be opened."""
        return Generation(feed, sinks, asked, self.requests, self._catalogue.forget)

    def texts(self, asked: Asked, place: int) -> list[TextStream]:
        """The answers to the prompt at `place`, as text."""
        prompt, n = asked.prompts[place], asked.wanted.n
        offset = 0
        if asked.echo:
            offset = len(prompt.text) if prompt.text is not None else len(asked.tokenizer.decode(prompt.ids))
        return [
            TextStream(place * n + choice, prompt.ids, asked.tokenizer, asked.wanted.texts, offset)
            for choice in range(n)
        ]

    def _check_room(self, asked: Asked) -> None:
        if self.requests.open_requests + len(asked.prompts) > self.limits.open_requests_max:
            message = f"{self.limits.open_requests_max} requests are open at this gateway"
            raise ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=1)
        biggest = max(len(prompt.ids) for prompt in asked.prompts)
        if biggest > self.limits.journals.journal_tokens_max:
            raise ApiError(
                413, f"a prompt of {biggest} tokens is more than this gateway holds", param=asked.prompt_param
            )
        if asked.request is not None and self.requests.is_open(asked.request):
            raise bad("request", f"request {asked.request} is already open")

    def _accepted(self, asked: Asked, prompt: Prompt, budget: int, place: int, request: RequestId) -> RequestAccepted:
        model = asked.model
        packed = pack_u32(prompt.ids)
        seeds = choice_seeds(asked.seed, asked.wanted.n)
        salt = asked.tenant
        patience = self.limits.request_deadline_s
        return RequestAccepted(
            request=request,
            deployment=model.deployment,
            prompt=packed,
            model_path=model.model_path,
            sampling=replace(asked.wanted.sampling, max_tokens=budget, seed=seeds[0]),
            seeds=seeds,
            priority=asked.priority,
            tenant=asked.tenant,
            tenant_salt=salt,
            prefix_hashes=prefix_hashes(packed, model.block_tokens, salt=salt, fingerprint=model.fingerprint),
            render=_render_blob(asked, place),
            deadline=self.clock.now() + min(patience, asked.deadline_s or patience),
        )


def _render_blob(asked: Asked, place: int) -> bytes:
    texts, text = asked.wanted.texts, asked.prompts[place].text
    echoed = asked.echo and text is not None and len(text) <= ECHOED_CHARS_MAX
    blob = RenderBlob(
        kind=asked.kind,
        created=asked.created,
        include_usage=asked.include_usage,
        place=place,
        places=len(asked.prompts),
        model=asked.model.name,
        deployment=asked.model.deployment,
        model_path=asked.model.model_path,
        tenant=asked.tenant,
        n=asked.wanted.n,
        echo=asked.echo,
        prompt_text=text if echoed else None,
        stops=texts.stops,
        include_stop=texts.include_stop,
        min_tokens=texts.min_tokens,
        logprobs=texts.logprobs,
        prompt_only=texts.prompt_only,
    )
    written = msgspec.json.encode(blob)
    if len(written) > RENDER_BYTES_MAX:
        size = len(written)
        raise bad("stop", f"what describes the stream takes {size} bytes, at most {RENDER_BYTES_MAX} are allowed")
    return written
