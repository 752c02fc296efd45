"""Sees whether a process that does not move could have moved: whether it wanted a processor and had none.

A thread that the kernel calls runnable wants one. The time it then ran stands in its schedstat (Linux,
Documentation/scheduler/sched-stats.rst); the rest it waited behind others, or its group was throttled. A virtual
processor that its host runs somebody else on ("steal" in /proc/stat) may count as running, and moves nothing either.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dataplane.processes import process_state

_STEAL = 8
"""Field of a processor's line of /proc/stat, its name being field 0."""

_TICKS = os.sysconf("SC_CLK_TCK")


class Starvation:
    """Of one process, from look to look. A look costs some 30 µs a thread: it is for a process under suspicion."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._looked: float | None = None
        # Seconds that each thread ran, and that each processor was another's.
        self._ran: dict[str, float] = {}
        self._stolen: dict[str, float] = {}

    def forget(self) -> None:
        """It moves: the next look is a first one."""
        self._looked = None

    def look(self, now: float) -> float:
        """Seconds since the last look for which its hungriest thread had no processor; 0 the first time, and for a
        process that sleeps, or is stopped."""
        ran, stolen = self._threads(), _stolen()
        passed = 0.0 if self._looked is None else now - self._looked
        hungry = [passed - (ran_s - self._ran[thread]) for thread, ran_s in ran.items() if thread in self._ran]
        robbed = [stolen_s - self._stolen.get(name, stolen_s) for name, stolen_s in stolen.items()]
        first, self._looked = self._looked is None, now
        self._ran, self._stolen = ran, stolen
        return 0.0 if first else min(passed, max([0.0, *hungry, *robbed]))

    def _threads(self) -> dict[str, float]:
        """How long each thread ran that wants to run now."""
        folder = Path(f"/proc/{self._pid}/task")
        ran: dict[str, float] = {}
        # Threads, and the whole process, may end meanwhile.
        with contextlib.suppress(OSError):
            for thread in os.listdir(folder):
                if process_state(int(thread)) == "R":
                    ran[thread] = int((folder / thread / "schedstat").read_text().split()[0]) / 1e9
        return ran


def _stolen() -> dict[str, float]:
    lines = Path("/proc/stat").read_text().splitlines()
    processors = (line.split() for line in lines if line.startswith("cpu") and not line.startswith("cpu "))
    return {fields[0]: int(fields[_STEAL]) / _TICKS for fields in processors}
