"""The command line of the simulator, as people use it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tools.sim.__main__ as command
from tests.sim.bugs_peers import slot_reused
from tools.sim.run import run_seed
from tools.sim.scenario import read_scenario
from tools.sim.shrink import alike

SEED = 4


def call(*arguments: str) -> Result:
    return CliRunner().invoke(command.app, arguments)


def test_a_seed_tells_its_story_filtered() -> None:
    told = call(str(SEED), "--only", "m-0", "--only", "w1")
    assert told.exit_code == 0
    head, *lines, end = told.stdout.splitlines()
    assert head.startswith(f"seed {SEED}: control_planes=")
    assert f"story {run_seed(SEED).digest}" in end
    story = [line for line in lines if not line.startswith("  ") or line.split()[1] in ("w1", "cp1", "cp2")]
    assert story
    assert all("m-0" in line or "w1" in line for line in story)


def test_many_seeds_are_counted() -> None:
    told = call("--seeds", "0..3", "--jobs", "2")
    assert told.exit_code == 0
    assert told.stdout.startswith("3 seeds in ")
    assert "0 failed" in told.stdout
    assert "faults during: " in told.stdout


@pytest.mark.parametrize(
    "arguments", [(), ("--seeds", "5"), ("seven",), ("--scenario", "no-such-file"), ("--scenario", __file__)]
)
def test_nonsense_is_refused(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2


def test_a_failure_is_shrunk_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "SCENARIOS", tmp_path)
    slot_reused(monkeypatch)
    told = call("--seeds", f"{SEED}..{SEED + 9}", "--save", "slots")
    assert told.exit_code == 1
    assert f"seed {SEED} failed: AssertionError: slots" in told.stdout
    kept = read_scenario(tmp_path / "slots.txt")
    assert kept.seed == SEED
    assert kept.faults == []
    assert alike(kept.run().error, kept.why)
    assert call("--scenario", str(tmp_path / "slots.txt")).exit_code == 1
