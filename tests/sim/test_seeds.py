"""A fixed and a fresh range of seeds. A seed that fails prints its number, its faults and the end of its story;
`python -m tools.sim SEED` prints all of it, and `--minutes` runs more fresh ones."""

from __future__ import annotations

import random
import time

import pytest

from tools.sim.__main__ import SEEDS_MAX
from tools.sim.faults import Fault
from tools.sim.run import Outcome, run_seed
from tools.sim.world import Shape

FIXED = range(5)
FRESH_CPU_S = 6.0
"""Processor time for seeds that nobody has run before."""
LINES_SHOWN = 60


def expect_well(outcome: Outcome) -> None:
    if not outcome.ok:
        faults = "\n".join(map(str, outcome.faults))
        story = "\n".join(outcome.story[-LINES_SHOWN:])
        pytest.fail(f"seed {outcome.seed}: {outcome.error}\n{outcome.shape}\n{faults}\n{story}\n{outcome.trace}")


@pytest.mark.parametrize("seed", FIXED)
def test_fixed_seeds(seed: int) -> None:
    expect_well(run_seed(seed))


def test_fresh_seeds() -> None:
    first, begun = random.SystemRandom().randrange(SEEDS_MAX), time.thread_time()
    for seed in range(first, first + SEEDS_MAX):
        expect_well(run_seed(seed))
        if time.thread_time() - begun >= FRESH_CPU_S:
            print(f"fresh seeds {first}..{seed + 1}")
            return


def test_without_faults_every_request_finishes() -> None:
    outcome = run_seed(1, [], Shape())
    expect_well(outcome)
    assert outcome.requests > 10
    assert set(outcome.outcomes) <= {"finished", "left"}


def test_streams_outlive_their_gateways() -> None:
    """Only control planes die, one after the other: who goes on elsewhere loses nothing."""
    faults = [Fault(8.0 + 2.5 * turn, "kill", f"cp{1 + turn % 3}", lasts=1.5) for turn in range(6)]
    outcome = run_seed(7, faults, Shape())
    expect_well(outcome)
    assert any("request_resumed" in line for line in outcome.story)
    assert set(outcome.outcomes) <= {"finished", "left", "cut"}


def test_a_seed_replays_to_the_byte() -> None:
    one, other = run_seed(4), run_seed(4)
    assert one.story == other.story
    assert one.digest == other.digest
