"""How long a peer has been silent, counted only while the judge itself ran. Pure."""
# pyright: strict

from __future__ import annotations

from controlplane.runtime.timing import Timings


class Silence:
    """Counts ticks: each adds at most two intervals, and one that comes more than three late proves that the judge was
    stopped, not the peer."""

    def __init__(self, timings: Timings, now: float) -> None:
        self._limit = timings.session_silence
        self._tick_max = 2 * timings.heartbeat_interval
        self._pause_min = 3 * timings.heartbeat_interval
        self._last_tick = now
        self._silent = 0.0
        self.heard_at = now

    def heard(self, now: float) -> None:
        """A frame came."""
        self.heard_at = now
        self._silent = 0.0

    def tick(self, now: float) -> bool:
        """True if the peer is silent for too long. To be called every heartbeat interval, after reading what came."""
        passed, self._last_tick = now - self._last_tick, now
        self._silent = 0.0 if passed > self._pause_min else self._silent + min(passed, self._tick_max)
        return self._silent >= self._limit
