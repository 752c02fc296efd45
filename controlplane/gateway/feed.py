"""From journals to one client: pieces wait here until the client's own task takes them; no reader ever waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from controlplane.gateway.detokenizer import Detokenizer
from controlplane.gateway.messages import Deliver, Failed
from controlplane.gateway.metrics import RequestClock
from controlplane.gateway.text_stream import Piece, TextStream, TokenInfo, token_info
from controlplane.gateway.tokenizer import ModelTokenizer
from controlplane.runtime.ids import RequestId
from controlplane.runtime.messages.serve import TokenLogprobs


class Sink(Protocol):
    """Whom a journal's effects reach. Every method returns at once."""

    def started(self, cached_tokens: int) -> None: ...

    def deliver(self, delivered: Deliver) -> None: ...

    def failed(self, failed: Failed) -> None: ...


class Feed:
    """The news of one response, from however many journals it is made."""

    def __init__(self, keepalive_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._pieces: list[Piece] = []
        self._keepalive_s = keepalive_s
        self._taken_at = self._loop.time()
        self._timer = self._loop.call_later(keepalive_s, self._keep_alive)
        self.failure: Failed | None = None
        # Choices whose end the client's task has not taken yet.
        self.open_choices = 0
        self.cached_tokens = 0

    def push(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._news.set()

    def start(self, cached_tokens: int) -> None:
        self.cached_tokens += cached_tokens
        self._news.set()

    def fail(self, failed: Failed) -> None:
        """The first failure is the response's."""
        self.failure = self.failure or failed
        self._news.set()

    async def news(self) -> list[Piece]:
        """Wait for anything to tell and take it. Nothing at all means that it is time for a sign of life."""
        await self._news.wait()
        self._news.clear()
        self._taken_at = self._loop.time()
        pieces, self._pieces = self._pieces, []
        self.open_choices -= sum(piece.finish is not None for piece in pieces)
        return pieces

    @property
    def over(self) -> bool:
        """Nothing more will come: every choice's end was taken, or all that there was before a failure."""
        return self.open_choices == 0 or (self.failure is not None and not self._pieces)

    def close(self) -> None:
        self._timer.cancel()

    def _keep_alive(self) -> None:
        now = self._loop.time()
        due = self._taken_at + self._keepalive_s
        if now >= due:
            self._taken_at, due = now, now + self._keepalive_s
            self._news.set()
        self._timer = self._loop.call_at(due, self._keep_alive)


class JournalSink:
    """One journal's part of a feed: renders what is delivered. `stop` is told of a choice that a stop string ended."""

    def __init__(
        self,
        request: RequestId,
        feed: Feed,
        texts: Sequence[TextStream],
        clock: RequestClock,
        stop: Callable[[RequestId, int], None],
        ended: frozenset[int] = frozenset(),
    ) -> None:
        """`ended`: choices whose end the client was told before."""
        self._request = request
        self._feed = feed
        self._texts = texts
        self._clock = clock
        self._stop = stop
        self._open = set(range(len(texts))) - ended
        self._cached_tokens = 0
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}
        feed.open_choices += len(self._open)

    @property
    def complete(self) -> bool:
        """Every choice came to its end."""
        return not self._open

    @property
    def tokens(self) -> int:
        """Tokens of all choices, up to their ends."""
        return sum(text.tokens for text in self._texts)

    def started(self, cached_tokens: int) -> None:
        # A replay finds its own tokens cached; only what the first prefill saved counts.
        new = cached_tokens if self._cached_tokens == 0 and self._clock.first_token_at is None else 0
        self._cached_tokens += new
        self._feed.start(new)

    def deliver(self, delivered: Deliver) -> None:
        for item in delivered.logprobs:
            if item.prompt:
                self.prompt_logprobs[item.index] = item
        choice = delivered.choice
        if choice not in self._open or not (delivered.tokens or delivered.finish):
            return
        self._clock.delivered(len(delivered.tokens))
        text = self._texts[choice]
        piece = text.add(delivered)
        if piece.finish is not None:
            self._open.remove(choice)
        self._feed.push(piece)
        if text.stopped and delivered.finish is None:
            self._stop(self._request, choice)

    def failed(self, failed: Failed) -> None:
        self._feed.fail(failed)


def prompt_infos(
    prompt: Sequence[int], known: dict[int, TokenLogprobs], tokenizer: ModelTokenizer
) -> tuple[TokenInfo, ...]:
    """The prompt's tokens as an echo with logprobs shows them; the first has none, for nothing stands before it."""
    infos: list[TokenInfo] = []
    detokenizer = Detokenizer(tokenizer.decode)
    offset = 0
    for index, token in enumerate(prompt):
        infos.append(token_info(token, known.get(index), offset))
        offset += len(detokenizer.add(token))
    return tuple(infos)
