"""Where a client is in a stream: the id of each of its events. Pure.

An event id is `stream:position`. The position has one part a choice, joined by commas: `-` before the choice has begun,
then the number of its tokens that the client was shown, with `!` once it was told the choice's end; `:end` follows once
usage was told. Text after token i is a function of tokens 0..i alone, so that a position is enough to go on from.
"""
# pyright: strict

from __future__ import annotations

import re
from dataclasses import dataclass

from controlplane.runtime.ids import RequestId, is_drawn_id

_PART = re.compile(r"-|(\d{1,9})(!?)")
_UNBEGUN = "-"
_END = "end"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client has of one choice."""

    # Its opening, such as the role of a chat's message, was shown.
    begun: bool = False
    tokens: int = 0
    finished: bool = False

    def __str__(self) -> str:
        return f"{self.tokens}{'!' if self.finished else ''}" if self.begun else _UNBEGUN


@dataclass(frozen=True, slots=True)
class Position:
    """What a client has of a stream. `choices` is empty for a client that has nothing."""

    choices: tuple[Seen, ...] = ()
    usage: bool = False

    def of(self, choice: int) -> Seen:
        return self.choices[choice] if choice < len(self.choices) else Seen()


class PositionInvalid(ValueError):
    """The text is no event id of this stream."""


def parse(text: str, stream: RequestId) -> Position:
    """The position that an event id of `stream` names. Raises PositionInvalid."""
    name, *rest = text.strip().split(":")
    if not is_drawn_id(name) or name != stream or not 1 <= len(rest) <= 2 or rest[1:] not in ([], [_END]):
        raise PositionInvalid(f"{text!r} is no event id of stream {stream}")
    return Position(tuple(_parse_part(part, text) for part in rest[0].split(",")), usage=len(rest) > 1)


def _parse_part(part: str, text: str) -> Seen:
    match = _PART.fullmatch(part)
    if match is None:
        raise PositionInvalid(f"{part!r} in {text!r} is no position in a choice")
    return Seen() if part == _UNBEGUN else Seen(True, int(match[1]), bool(match[2]))


class Writer:
    """Names a stream's events as they are written."""

    def __init__(self, stream: RequestId, choices: int, at: Position) -> None:
        self._stream = stream
        self._parts = [str(at.of(choice)) for choice in range(choices)]

    def begin(self, choice: int) -> bool:
        """Note that the choice's opening is written; False if it was before."""
        if self._parts[choice] != _UNBEGUN:
            return False
        self._parts[choice] = "0"
        return True

    def move(self, choice: int, tokens: int, *, finished: bool) -> None:
        """Note that `tokens` of the choice's tokens are shown, with what is written next."""
        self._parts[choice] = f"{tokens}!" if finished else str(tokens)

    def line(self) -> bytes:
        """The id line of the event that is written now."""
        return f"id: {self._stream}:{','.join(self._parts)}\n".encode()

    def end_line(self) -> bytes:
        """The id line of the usage event."""
        return f"id: {self._stream}:{','.join(self._parts)}:{_END}\n".encode()
