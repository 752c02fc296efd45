"""Many seeds, one after the other or in several processes, until a bound is reached or one fails."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tools.sim.run import Outcome, run_seed


@dataclass(slots=True)
class Tally:
    """What a campaign went through."""

    seeds: int = 0
    faults: int = 0
    requests: int = 0
    virtual_s: float = 0.0
    wall_s: float = 0.0
    # Of all processes together.
    cpu_s: float = 0.0
    healed_s_max: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    # Faults that struck while that was under way.
    during: Counter[str] = field(default_factory=Counter[str])
    failed: list[Outcome] = field(default_factory=list[Outcome])

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.faults += outcome.struck
        self.requests += outcome.requests
        self.virtual_s += outcome.virtual_s
        self.cpu_s += outcome.cpu_s
        self.outcomes += outcome.outcomes
        self.during += outcome.during
        self.healed_s_max = max(self.healed_s_max, outcome.healed_s)
        if not outcome.ok:
            self.failed.append(outcome)

    def __str__(self) -> str:
        a_minute = self.seeds / self.cpu_s * 60 if self.cpu_s else 0.0
        ends = ", ".join(f"{name} {count}" for name, count in self.outcomes.most_common())
        during = ", ".join(f"{name} {count}" for name, count in self.during.most_common())
        return (
            f"{self.seeds} seeds in {self.wall_s:.1f} s ({a_minute:.0f} a minute of one core), "
            f"{self.virtual_s / 3600:.2f} virtual hours, {self.faults} faults, {self.requests} requests ({ends}), "
            f"healthy again within {self.healed_s_max:.1f} s; {len(self.failed)} failed"
            + (f"\nfaults during: {during}" if during else "")
        )


def run_campaign(
    seeds: Iterable[int], *, jobs: int, minutes: float | None, failures_max: int, on_failure: Callable[[Outcome], None]
) -> Tally:
    """Run `seeds` in `jobs` processes, for at most `minutes`, until `failures_max` failed, or until interrupted."""
    tally, begun = Tally(), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        for outcome in _outcomes(seeds, jobs):
            tally.add(outcome)
            tally.wall_s = time.monotonic() - begun
            if not outcome.ok:
                on_failure(outcome)
            if len(tally.failed) >= failures_max or (minutes is not None and tally.wall_s >= minutes * 60):
                break
    return tally


def _outcomes(seeds: Iterable[int], jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(run_seed, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _leave_interrupts) as pool:
        # Bounded chunks, for the seeds may have no end.
        batch: list[int] = []
        for seed in seeds:
            batch.append(seed)
            if len(batch) == 16 * jobs:
                yield from pool.imap_unordered(run_seed, batch)
                batch = []
        yield from pool.imap_unordered(run_seed, batch)


def _leave_interrupts() -> None:
    """The process that counts hears of them, and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
