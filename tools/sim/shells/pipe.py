"""One direction of a stream: frames arrive in order, after a delay, and only while the reader has room."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Protocol

import grpc.aio

from tools.sim.kernel import Kernel

WINDOW_FRAMES = 16
"""Frames that a writer may be ahead of the reader; real streams count bytes."""

EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]


class Way(Protocol):
    """What a pipe runs through."""

    kernel: Kernel

    def delay(self, source: str, target: str) -> float: ...

    def is_cut(self, source: str, target: str) -> bool: ...


class Pipe:
    """One direction of a stream."""

    def __init__(self, way: Way, source: str, target: str) -> None:
        self._way = way
        self._ends = (source, target)
        self._frames: deque[bytes] = deque()
        self._flying: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._due = 0.0
        # The writer ended it: EOF, or its error, after the frames before it.
        self._finish: Any = None
        self._finishing: Any = None
        self.broken: BaseException | None = None

    async def write(self, frame: bytes) -> None:
        """Waits while the reader is WINDOW_FRAMES behind. Raises what broke the stream."""
        while len(self._frames) + len(self._flying) >= WINDOW_FRAMES and self.broken is None:
            self._room.clear()
            await self._room.wait()
        if self.broken is not None:
            raise self.broken
        self.push(frame)

    def push(self, frame: bytes) -> None:
        """A first frame, for which there always is room."""
        self._flying.append(frame)
        self._land_later()

    async def read(self) -> Any:
        """The next frame, or EOF. Raises what ended the stream."""
        while not self._frames:
            if self.broken is not None:
                raise self.broken
            if self._finish is not None:
                if self._finish is EOF:
                    return EOF
                raise self._finish
            self._news.clear()
            await self._news.wait()
        self._room.set()
        return self._frames.popleft()

    def finish(self, with_what: Any = EOF) -> None:
        """No more frames: EOF, or an error."""
        self._finishing = with_what
        self._land_later()

    def snap(self, error: BaseException) -> None:
        """It is over at once, at both ends; what was under way is lost."""
        if self.broken is None:
            self.broken = error
            self._frames.clear()
            self._news.set()
            self._room.set()

    def _land_later(self) -> None:
        self._due = max(self._due, self._way.kernel.now + self._way.delay(*self._ends))
        self._way.kernel.at(self._due, self.land)

    def land(self) -> None:
        """Frames that are due arrive; none while the way is cut."""
        if self.broken is not None or self._way.is_cut(*self._ends):
            return
        if self._flying:
            self._frames.append(self._flying.popleft())
        elif self._finishing is not None:
            self._finish = self._finishing
        self._news.set()

    def flush(self) -> None:
        """Some way is free again; perhaps this one."""
        if self._way.is_cut(*self._ends):
            return
        while self._flying and self.broken is None:
            self.land()
        if self._finishing is not None:
            self.land()
