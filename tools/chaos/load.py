"""Client streams while faults happen: each event timed, each text kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tools.client.stream import Refused, StreamClient, StreamLost

NEW_REQUEST_TOKENS = 4


@dataclass(slots=True)
class Stream:
    """What one client saw."""

    # Streams of one number have one prompt.
    number: int
    text: str = ""
    # time.monotonic of each event.
    times: list[float] = field(default_factory=list[float])
    finish: str = ""
    error: str = ""

    @property
    def prompt(self) -> str:
        return f"Stream {self.number} tells of the sea and of number {self.number * 7919}."

    @property
    def over(self) -> bool:
        return bool(self.finish or self.error)

    def longest_gap_s(self, since: float = 0.0) -> float:
        """Longest silence between two events, as far as it was after `since` (time.monotonic)."""
        return max((after - max(before, since) for before, after in pairwise(self.times)), default=0.0)


@dataclass(slots=True)
class NewRequests:
    """Short requests sent all along, and how they fared."""

    served: int = 0
    failed: list[str] = field(default_factory=list[str])
    longest_s: float = 0.0


class Load:
    """Streams over all gateways; each begins at another one and goes on wherever it can. When one ends, the next of its
    number begins, until it is enough."""

    def __init__(self, urls: Sequence[str], count: int, tokens: int) -> None:
        self._urls = list(urls)
        self._tokens = tokens
        self.streams = [Stream(number) for number in range(count)]
        self.new = NewRequests()
        self._first = tuple(self.streams)
        self._enough = False
        self._stop = asyncio.Event()
        # Some stream had an event or ended. Whoever waits looks again, and clears it.
        self._moved = asyncio.Event()

    async def run(self) -> None:
        """Until it is enough and every stream has ended."""
        await asyncio.gather(*(self._follow_all(stream) for stream in self._first))
        self._stop.set()
        self._moved.set()

    def enough(self) -> None:
        """What runs is the last."""
        self._enough = True

    async def reach(self, events: int) -> None:
        """Return once every one of the first streams had so many events, or is over."""
        while any(len(stream.times) < events and not stream.over for stream in self._first):
            self._moved.clear()
            await self._moved.wait()

    async def ask_all_along(self, every_s: float) -> None:
        """Send a short request every so often, until the streams have ended."""
        number = 0
        async with asyncio.TaskGroup() as tasks:
            while not self._stop.is_set():
                tasks.create_task(self._ask(number))
                number += 1
                await asyncio.sleep(every_s)

    async def _follow_all(self, stream: Stream) -> None:
        await self._follow(stream)
        while not self._enough and not stream.error:
            stream = Stream(stream.number)
            self.streams.append(stream)
            await self._follow(stream)

    async def _follow(self, stream: Stream) -> None:
        body = {"prompt": stream.prompt, "max_tokens": self._tokens, "temperature": 0, "ignore_eos": True}
        shift = stream.number % len(self._urls)
        client = StreamClient(self._urls[shift:] + self._urls[:shift])
        try:
            async for chunk in client.stream("/v1/completions", body):
                stream.times.append(time.monotonic())
                self._moved.set()
                for choice in chunk["choices"]:
                    stream.text += choice["text"]
                    stream.finish = choice["finish_reason"] or stream.finish
        except (Refused, StreamLost) as error:
            stream.error = str(error)
        self._moved.set()

    async def _ask(self, number: int) -> None:
        begun = time.monotonic()
        body = {"prompt": f"New request {number}", "max_tokens": NEW_REQUEST_TOKENS, "temperature": 0}
        shift = number % len(self._urls)
        try:
            async for _ in StreamClient(self._urls[shift:] + self._urls[:shift]).stream("/v1/completions", body):
                pass
        except (Refused, StreamLost) as error:
            self.new.failed.append(str(error))
            return
        self.new.served += 1
        self.new.longest_s = max(self.new.longest_s, time.monotonic() - begun)
