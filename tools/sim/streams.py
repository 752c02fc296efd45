"""Both ends of a stream between shells: what came in order, and its end."""

from __future__ import annotations

from collections import deque
from typing import Any

from tools.sim.network import Network, Refused, Side
from tools.sim.process import Future, Process


class StreamEnded(Exception):
    """The stream is over; the text says why."""


class Reader:
    """The frames of a client's end, for the one task that reads them."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._frames: deque[Any] = deque()
        self._woken = Future()
        side.on_frame = self._take
        side.on_closed = self._end

    def pending(self) -> Future:
        """Done when there is a frame, or the end."""
        if self._frames or self.side.closed:
            self._woken.set()
        else:
            self._woken = Future()
        return self._woken

    async def read(self) -> Any:
        """The next frame. Raises StreamEnded."""
        while not self._frames:
            if self.side.closed:
                raise StreamEnded("the stream ended")
            await self.pending()
        return self._frames.popleft()

    def _take(self, frame: Any) -> None:
        self._frames.append(frame)
        self._woken.set()

    def _end(self) -> None:
        self._woken.set()


async def dial(process: Process, network: Network, address: str, service: str, timeout: float) -> Side:
    """A connection whose far end greeted in time. Raises StreamEnded."""
    dialled = network.dial(process, address, service)
    if await process.first(dialled, timeout=timeout) < 0:
        dialled.then(lambda: dialled.value.close() if dialled.value is not None else None)
        raise StreamEnded("no connection in time")
    try:
        return await dialled
    except Refused as error:
        raise StreamEnded("connection refused") from error
