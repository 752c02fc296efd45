"""The simulator is only worth what it finds: every deliberate bug must show within a few seeds."""

from __future__ import annotations

import pytest

from tests.sim.mutants import MUTANTS, Mutant
from tools.sim.faults import KINDS, Fault, draw_schedule
from tools.sim.run import FAULTS_S, run_seed

SEEDS_MAX = 12
WARM_S = 5.0
PATIENCE_S = 30.0
"""The faults that bring mutants out are few: without the mutant all is well long before."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_mutant_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed that is known to find it comes first; should the cores have changed, another one must."""
    mutant.apply(monkeypatch)
    seeds = [mutant.seeds - 1, *(seed for seed in range(SEEDS_MAX) if seed != mutant.seeds - 1)]
    for seed in seeds:
        outcome = run_seed(seed, faults_for(mutant, seed), mutant.shape, PATIENCE_S)
        if not outcome.ok:
            print(f"{mutant.name}: found by seed {seed}: {outcome.error}")
            return
    pytest.fail(f"{mutant.name} is not found within {SEEDS_MAX} seeds")


def faults_for(mutant: Mutant, seed: int) -> list[Fault]:
    shape = mutant.shape
    names = [f"cp{n}" for n in range(1, shape.control_planes + 1)], [f"w{n}" for n in range(1, shape.workers + 1)]
    kinds = tuple(kind for kind in KINDS if kind.name in mutant.kinds)
    return draw_schedule(seed, names, shape.devices, WARM_S, WARM_S + FAULTS_S, kinds) if kinds else []
