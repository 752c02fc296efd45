"""A stream that began at another gateway: its shadow found at a worker, its journal adopted, its text gone on with."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass

from controlplane.gateway.api_errors import SERVER_ERROR, ApiError, bad
from controlplane.gateway.cursor import Position
from controlplane.gateway.feed import Feed, JournalSink
from controlplane.gateway.generation import Asked, Generation, Generator, Prompt
from controlplane.gateway.messages import ChoiceSeen, RequestAccepted, ShadowFound, StreamAdopted
from controlplane.gateway.metrics import RequestClock
from controlplane.gateway.params import Wanted
from controlplane.gateway.render_blob import BlobUnreadable, RenderBlob, place_id, read_blob
from controlplane.gateway.text_stream import TextStream
from controlplane.runtime.ids import RequestId
from controlplane.runtime.messages.serve import Shadow
from controlplane.runtime.packing import unpack_u32

_TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Part:
    """One journal of the stream, as its worker held it."""

    found: ShadowFound
    shadow: Shadow
    blob: RenderBlob


class Resumer:
    """Goes on with streams. Shared by the HTTP and the gRPC edge."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._requests = generator.requests

    async def open(self, stream: RequestId, at: Position) -> Generation:
        """The generation from where its client is. Raises ApiError: 404 if nobody holds the stream, 410 if less of it
        is left than the client has, 409 while another client resumes it, 503 if it is worth asking again."""
        with ExitStack() as claims:
            parts = await self._find_all(stream, claims)
            first = parts[0].blob
            if at.choices and len(at.choices) != first.places * first.n:
                raise bad("last_event_id", f"the stream has {first.places * first.n} choices, not {len(at.choices)}")
            seen = [_seen(part, at) for part in parts]
            model, tokenizer = await self._generator.model_begun(first.model, first.deployment, first.model_path)
            asked = Asked(
                model=model,
                tokenizer=tokenizer,
                wanted=Wanted(parts[0].shadow.sampling, first.texts, None, "max_tokens", first.n),
                prompts=[_prompt(part) for part in parts],
                prompt_param="prompt",
                tenant=first.tenant,
                kind=first.kind,
                created=first.created,
                include_usage=first.include_usage,
                echo=first.echo,
            )
            feed = Feed(self._generator.limits.keepalive_s)
            sinks: list[tuple[RequestId, JournalSink]] = []
            generation = self._generator.generation(feed, sinks, asked)
            for place, part in enumerate(parts):
                request = part.found.request
                texts = self._generator.texts(asked, place)
                sink = self._sink(feed, part, texts, seen[place])
                sinks.append((request, sink))
                feed.cached_tokens += part.shadow.cached_tokens
                self._requests.adopt(self._adopted(part, seen[place]), sink)
            return generation

    async def _find_all(self, stream: RequestId, claims: ExitStack) -> list[_Part]:
        first = await self._find(stream, claims)
        others = (self._find(place_id(stream, place), claims) for place in range(1, first.blob.places))
        return [first, *await asyncio.gather(*others)]

    async def _find(self, request: RequestId, claims: ExitStack) -> _Part:
        if not claims.enter_context(self._requests.claim(request)):
            raise ApiError(409, "the stream is being resumed by another client", code="superseded")
        found = await self._requests.find(request)
        if found.shadow is None:
            message = f"stream {request}: {found.reason.text}"
            if found.certain:
                raise ApiError(404, message, code="stream_not_found", final=True)
            raise ApiError(503, message, kind=SERVER_ERROR, code="unavailable", retry_after_s=1)
        try:
            return _Part(found, found.shadow, read_blob(found.shadow.render))
        except BlobUnreadable as error:
            raise ApiError(410, str(error), code="stream_lost", final=True) from error

    def _adopted(self, part: _Part, seen: tuple[ChoiceSeen, ...]) -> StreamAdopted:
        shadow, blob = part.shadow, part.blob
        assert shadow.permit is not None
        now, patience = self._generator.clock.now(), self._generator.limits.request_deadline_s
        asked = RequestAccepted(
            request=part.found.request,
            deployment=blob.deployment,
            prompt=shadow.prompt,
            model_path=blob.model_path,
            sampling=shadow.sampling,
            seeds=tuple(choice.seed for choice in shadow.choices),
            priority=shadow.permit.priority,
            tenant=blob.tenant,
            tenant_salt=blob.tenant,
            render=shadow.render,
            deadline=now + (shadow.remaining_ms / 1000 if shadow.remaining_ms else patience),
        )
        return StreamAdopted(asked, part.found.worker, part.found.node, shadow, seen)

    def _sink(self, feed: Feed, part: _Part, texts: list[TextStream], seen: tuple[ChoiceSeen, ...]) -> JournalSink:
        for choice, text, had in zip(part.shadow.choices, texts, seen, strict=True):
            text.skip(unpack_u32(choice.delivered)[: had.tokens])
        clock = RequestClock(self._generator.metrics, self._generator.clock)
        clock.first_token_at = self._generator.clock.now()
        ended = frozenset(place for place, had in enumerate(seen) if had.finished)
        return JournalSink(part.found.request, feed, texts, clock, self._requests.stop_choice, ended)


def _seen(part: _Part, at: Position) -> tuple[ChoiceSeen, ...]:
    """What the client has of this part's choices. Raises ApiError if that is more than there is."""
    first = part.blob.place * part.blob.n
    seen: list[ChoiceSeen] = []
    for place, choice in enumerate(part.shadow.choices):
        had = at.of(first + place)
        held = len(choice.delivered) // _TOKEN_BYTES
        if had.tokens > held:
            message = f"of choice {first + place} {held} tokens are left, and the client has {had.tokens}"
            raise ApiError(410, message, code="stream_lost", final=True)
        seen.append(ChoiceSeen(had.tokens, had.finished))
    return tuple(seen)


def _prompt(part: _Part) -> Prompt:
    return Prompt(list(unpack_u32(part.shadow.prompt)), part.blob.prompt_text)
