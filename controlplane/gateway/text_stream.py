"""One choice's answer as text: detokenised, cut at stop strings, with the log probabilities of its tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.gateway.detokenizer import Detokenizer, StopStrings
from controlplane.gateway.messages import Deliver
from controlplane.gateway.tokenizer import ModelTokenizer
from controlplane.runtime.ids import RequestId
from controlplane.runtime.messages.serve import FinishReason, TokenLogprobs
from controlplane.runtime.packing import unpack_f32, unpack_u32

_NO_REQUEST = RequestId("")


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token with its log probability, None where the engine computed none, and the best alternatives."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    # Characters of the answer before it.
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What a client is told next about one choice. `text` may be empty."""

    choice: int
    text: str
    first_index: int = 0
    token_ids: Sequence[int] = ()
    infos: tuple[TokenInfo, ...] = ()
    # "stop" or "length" with the last piece.
    finish: str | None = None
    # The stop string or stop token id that ended it; None for an end-of-sequence token.
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How answers are shown."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    logprobs: bool = False
    # The engine had to compute one token that nobody asked for.
    prompt_only: bool = False


class TextStream:
    """Turns a choice's deliveries into pieces. `stopped` is set once a stop string ended it."""

    def __init__(
        self, choice: int, prompt: Sequence[int], tokenizer: ModelTokenizer, options: TextOptions, offset: int = 0
    ) -> None:
        self._choice = choice
        self._tokenizer = tokenizer
        self._options = options
        self._detokenizer = Detokenizer(tokenizer.decode, prompt)
        self._stops = StopStrings(options.stops, include=options.include_stop)
        # Nothing to look for and nothing to place: the offset is not kept.
        self._is_plain = not options.stops and not options.logprobs
        self._offset = offset
        self.tokens = 0
        self.stopped = False

    def skip(self, tokens: array[int]) -> None:
        """Take in tokens that the client was shown before: what follows goes on from their text."""
        if tokens:
            self.add(Deliver(_NO_REQUEST, self._choice, self.tokens, tokens, (), None))

    def add(self, delivered: Deliver) -> Piece:
        """The piece that a delivery makes; not to be called after `stopped` or a finish."""
        first, finish = self.tokens, delivered.finish
        if self._options.prompt_only:
            return Piece(self._choice, "", finish="length" if finish else None)
        if self._is_plain and finish is None:
            texts = [self._detokenizer.add(token) for token in delivered.tokens]
            self.tokens += len(texts)
            return Piece(self._choice, texts[0] if len(texts) == 1 else "".join(texts), first, delivered.tokens)
        details = {item.index: item for item in delivered.logprobs if not item.prompt}
        infos: list[TokenInfo] = []
        texts: list[str] = []
        last = len(delivered.tokens) - 1
        ends_with_token = finish is not None and finish.reason == FinishReason.STOP
        for place, token in enumerate(delivered.tokens):
            if self._options.logprobs:
                infos.append(self._info(token, details.get(self.tokens)))
            self.tokens += 1
            hidden = place == last and ends_with_token and not self._is_shown(token)
            texts.append("" if hidden else self._add_token(token))
            if self._stops.found is not None:
                self.stopped = True
                break
        ids = delivered.tokens[: self.tokens - first]
        if self.stopped:
            return Piece(self._choice, "".join(texts), first, ids, tuple(infos), "stop", self._stops.found)
        if finish is None:
            return Piece(self._choice, "".join(texts), first, ids, tuple(infos))
        texts.append(self._stops.flush())
        reason = "stop" if ends_with_token else "length"
        stop_id = None if finish.stop_id in self._tokenizer.eos_ids else finish.stop_id
        return Piece(self._choice, "".join(texts), first, ids, tuple(infos), reason, stop_id)

    def _is_shown(self, token: int) -> bool:
        return self._options.include_stop and token not in self._tokenizer.eos_ids

    def _add_token(self, token: int) -> str:
        text = self._detokenizer.add(token)
        self._offset += len(text)
        if self.tokens <= self._options.min_tokens:
            return text
        return self._stops.add(text) if text else ""

    def _info(self, token: int, details: TokenLogprobs | None) -> TokenInfo:
        return token_info(token, details, self._offset)


def token_info(token: int, details: TokenLogprobs | None, offset: int) -> TokenInfo:
    """`details` as the edge shows it."""
    if details is None:
        return TokenInfo(token, None, (), offset)
    top = tuple(zip(unpack_u32(details.top_ids), unpack_f32(details.top_values), strict=True))
    return TokenInfo(token, details.chosen, top, offset)
