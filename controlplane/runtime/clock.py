"""Time as an argument: shells hold a Clock, cores are passed `now`."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic time in seconds, wall time for records, and waiting."""

    def now(self) -> float:
        """Monotonic seconds; only differences mean anything."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since 1970, for records shown to people, never for decisions."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
