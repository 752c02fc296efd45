"""The simulator is only worth what it finds: every deliberate bug must show within a few seeds."""

from __future__ import annotations

import pytest

from tests.sim.mutants import MUTANTS, SEEDS_MAX, Mutant, hunt


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_mutant_is_found(mutant: Mutant) -> None:
    """The seed that is known to find it comes first; should the cores have changed, another one must."""
    known = mutant.seeds - 1
    count, error = hunt(mutant, [known, *(seed for seed in range(SEEDS_MAX) if seed != known)])
    assert count, f"{mutant.name} is not found within {SEEDS_MAX} seeds"
    seeds = mutant.seeds if count == 1 else count
    print(f"{mutant.name}: found within {seeds} seeds: {error}")
