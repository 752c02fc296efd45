"""Waiting between attempts to reach a peer: doubling and jittered (PROTOCOL §6, reconnect)."""

from __future__ import annotations

from random import Random

from controlplane.runtime.timing import Timings

JITTER = 0.2


class Backoff:
    """Seconds to wait before the next attempt, from `reconnect_min` doubling to `reconnect_max`, ±20 %."""

    def __init__(self, timings: Timings, random: Random) -> None:
        self._min = timings.reconnect_min
        self._max = timings.reconnect_max
        self._random = random
        self._next = self._min

    def next(self) -> float:
        """The wait before the coming attempt; longer at each call until `reset`."""
        wait = self._next * self._random.uniform(1 - JITTER, 1 + JITTER)
        self._next = min(self._next * 2, self._max)
        return wait

    def reset(self) -> None:
        """To be called after a success."""
        self._next = self._min
