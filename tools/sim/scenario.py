"""Named runs in text files: a world's shape, its seed, its faults. tests/scenario/sim runs every one of them for ever.

# why this scenario is kept
seed 1234
shape control_planes=3 workers=2 devices=1 replicas=2 tensor=1
12.300 kill w1 for 2.100
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools.sim.faults import Fault, parse_fault
from tools.sim.run import Outcome, run_seed
from tools.sim.shrink import shape_text
from tools.sim.world import Shape


@dataclass(frozen=True, slots=True)
class Scenario:
    """One file."""

    seed: int
    shape: Shape
    faults: list[Fault]
    why: str = ""

    def run(self) -> Outcome:
        return run_seed(self.seed, self.faults, self.shape)

    def __str__(self) -> str:
        head = [f"# {line}" for line in self.why.splitlines()]
        return "\n".join([*head, f"seed {self.seed}", f"shape {shape_text(self.shape)}", *map(str, self.faults)]) + "\n"


def read_scenario(path: Path) -> Scenario:
    """The scenario in a file. Raises ValueError."""
    seed, shape, faults, why = 0, Shape(), list[Fault](), list[str]()
    for line in path.read_text().splitlines():
        word, _, rest = line.partition(" ")
        if line.startswith("#"):
            why.append(line.lstrip("# "))
        elif word == "seed":
            seed = int(rest)
        elif word == "shape":
            shape = Shape(**{name: int(value) for name, value in (pair.split("=") for pair in rest.split())})
        elif line.strip():
            faults.append(parse_fault(line))
    return Scenario(seed, shape, faults, "\n".join(why))


def of_outcome(outcome: Outcome, why: str) -> Scenario:
    return Scenario(outcome.seed, outcome.shape, outcome.faults, why)
