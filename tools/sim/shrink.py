"""A failing schedule made short: fewer faults, then shorter ones, as long as the run still fails alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tools.sim.faults import Fault
from tools.sim.run import Outcome, run_seed
from tools.sim.world import Shape

RUNS_MAX = 120
WORDS_COMPARED = 5


def alike(one: str, other: str) -> bool:
    """Both errors are of one kind: ids and numbers aside."""
    return _kind(one) == _kind(other)


def _kind(error: str) -> str:
    words = [word for word in error.split() if not any(letter.isdigit() for letter in word)]
    return " ".join(words[:WORDS_COMPARED])


def shrink(failed: Outcome, tell: Callable[[str], None]) -> Outcome:
    """The shortest run found that fails like `failed`, within RUNS_MAX runs."""
    search = _Search(failed, tell)
    search.drop_faults()
    search.shorten_faults()
    return search.best


class _Search:
    def __init__(self, failed: Outcome, tell: Callable[[str], None]) -> None:
        self.best = failed
        self._error = failed.error
        self._tell = tell
        self._runs = 0

    def drop_faults(self) -> None:
        """Leave out ever smaller pieces of the schedule (Zeller's ddmin, without complements)."""
        size = max(1, len(self.best.faults) // 2)
        while size:
            start = 0
            while start < len(self.best.faults):
                faults = self.best.faults[:start] + self.best.faults[start + size :]
                if not self._fails(faults):
                    start += size
            size //= 2

    def shorten_faults(self) -> None:
        for index, fault in enumerate(self.best.faults):
            if fault.lasts > 1:
                faults = list(self.best.faults)
                faults[index] = replace(fault, lasts=round(fault.lasts / 2, 3))
                self._fails(faults)

    def _fails(self, faults: list[Fault]) -> bool:
        if self._runs >= RUNS_MAX:
            return False
        self._runs += 1
        outcome = run_seed(self.best.seed, faults, self.best.shape)
        if outcome.ok or not alike(outcome.error, self._error):
            return False
        self.best = outcome
        self._tell(f"{len(faults)} faults still fail")
        return True


def shape_text(shape: Shape) -> str:
    """The shape as scenarios write it."""
    return (
        f"control_planes={shape.control_planes} workers={shape.workers} devices={shape.devices} "
        f"replicas={shape.replicas} tensor={shape.tensor} pipeline={shape.pipeline} "
        f"elastic={shape.elastic} spares={shape.spares}"
    )
