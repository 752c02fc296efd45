"""Tokens to text as they come: never half a character, never a stop string. Pure, given a `decode`.

Text after token i is a function of tokens 0..i alone, so that any gateway that has the tokens has the text.
"""
# pyright: strict

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF_CHARACTER = "\ufffd"

CONTEXT_TOKENS = 6
"""Prompt tokens that stand before the first generated one, so that its leading space is right."""

HELD_TOKENS_MAX = 32
"""Text that ends in a replacement character is held for this many tokens; past that the bytes are no text at all."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Incremental decoding over a sliding window of ids: the text that a token adds is the difference that it makes.

    The window starts at the last boundary where the text was whole, so that decoders that look back (byte fallback,
    leading spaces) see what they need, and a token costs two short decodes.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context[-CONTEXT_TOKENS:])
        # A prompt of ids may end within a character, which then belongs to the answer.
        self._shown = decode(self._window).rstrip(HALF_CHARACTER) if self._window else ""
        # Ids of the window whose text is in `_shown`.
        self._settled = len(self._window)

    def add(self, token: int) -> str:
        """The text that became whole with `token`; "" while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = not text.endswith(HALF_CHARACTER) or len(self._window) - self._settled > HELD_TOKENS_MAX
        if not whole:
            return ""
        new = text[len(self._shown) :]
        if new:
            self._window = self._window[self._settled :]
            self._shown = self._decode(self._window)
            self._settled = len(self._window)
        elif len(self._window) - self._settled > HELD_TOKENS_MAX:
            # A long run of tokens without text, such as special ones: keep the window short.
            self._window = self._window[: self._settled]
        return new


class StopStrings:
    """Finds the first stop string in a growing text, holding back what may become one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held: str = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """The part of `text`, and of what was held, that may be shown now. After `found` is set: nothing any more."""
        if not self._stops or self.found is not None:
            return text if self.found is None else ""
        held = self._held + text
        ends = [(held.find(stop) + len(stop), stop) for stop in self._stops if stop in held]
        if ends:
            end, stop = min(ends)
            self.found, self._held = stop, ""
            return held[:end] if self._include else held[: end - len(stop)]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
