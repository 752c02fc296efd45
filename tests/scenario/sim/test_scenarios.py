"""Runs that once failed, cut short: each must stay well for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sim.test_seeds import expect_well
from tools.sim.scenario import read_scenario

SCENARIOS = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    expect_well(read_scenario(path).run())
