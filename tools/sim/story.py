"""What happened in a run, line by line: printed for people, digested to prove that a replay is the same to the byte."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

LINES_KEPT = 200_000


class Story:
    """Lines so far. Memory is bounded: the oldest go first; the digest counts all."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._digest = hashlib.blake2b(digest_size=16)

    def tell(self, now: float, who: str, what: str, about: Mapping[str, object]) -> None:
        details = "".join(f" {name}={value}" for name, value in about.items() if value not in ("", None))
        line = f"{now:9.4f} {who:<8} {what}{details}"
        self.lines.append(line)
        self._digest.update(line.encode())

    @property
    def digest(self) -> str:
        """Equal for equal stories."""
        return self._digest.hexdigest()


def filtered(lines: Iterable[str], words: tuple[str, ...] = ()) -> Iterator[str]:
    """The lines that name any of `words`: a request, a node, a replica; all without words."""
    return (line for line in lines if not words or any(word in line for word in words))
