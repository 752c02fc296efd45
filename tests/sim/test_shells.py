"""The real shells in virtual time: a few seeds, and deliberate bugs that must be found."""

from __future__ import annotations

import pytest

from tests.sim.shell_mutants import SHELL_MUTANTS, ShellMutant
from tools.sim.shells.run import Outcome, run_seed

FULL_MAILBOX = 18
"""A leader is told to go while its mailbox is full."""
KILLED_IN_LEAVING = 788871807
"""A worker is killed while it waits for its last frames to leave."""
LINES_SHOWN = 60
SEEDS_MAX = 12
"""Seeds that each mutant is given."""
PATIENCE_S = 20.0
"""Without the mutant all is well sooner."""


def expect_well(outcome: Outcome) -> None:
    if not outcome.ok:
        faults, story = "\n".join(map(str, outcome.faults)), "\n".join(outcome.story[-LINES_SHOWN:])
        pytest.fail(f"shells seed {outcome.seed}: {outcome.error}\n{faults}\n{story}\n{outcome.trace}")


def test_a_leader_leaves_though_its_mailbox_is_full() -> None:
    expect_well(run_seed(FULL_MAILBOX, PATIENCE_S))


def test_nothing_is_left_of_a_worker_that_was_killed_while_it_left() -> None:
    expect_well(run_seed(KILLED_IN_LEAVING))


def test_a_seed_replays_to_the_byte() -> None:
    one, other = run_seed(1), run_seed(1)
    expect_well(one)
    assert one.outcomes["finished"] > 10
    assert one.story == other.story
    assert one.digest == other.digest


@pytest.mark.parametrize("mutant", SHELL_MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_shell_mutant_is_found(mutant: ShellMutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    for seed in range(mutant.seed, mutant.seed + SEEDS_MAX):
        outcome = run_seed(seed, PATIENCE_S)
        if mutant.shows_as in outcome.error and not outcome.ok:
            print(f"{mutant.name}: found by seed {seed}: {outcome.error}")
            return
    pytest.fail(f"{mutant.name} is not found by {SEEDS_MAX} seeds from {mutant.seed} on")
