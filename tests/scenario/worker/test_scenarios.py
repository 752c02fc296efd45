"""Plays every text scenario beside this file. `python -m tests.scenario.worker.rewrite` writes what really happens
into them, for review."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenario.worker.script import play

SCENARIOS = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    played = play(path.read_text())
    assert played, "an empty scenario"
    for block, happened in played:
        assert happened == block.expected, "\n".join(block.commands)
