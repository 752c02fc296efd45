"""Plans of faults, verdicts, and the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tools.chaos.command import CORE_PLAN
from tools.chaos.load import Load
from tools.chaos.plan import Action, PlanError, read_plan
from tools.chaos.report import write_report
from tools.chaos.rounds import Outcome, Result, differing


def plan_file(folder: Path, *faults: object) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"rounds": [{"faults": list(faults)}]}))
    return path


def test_the_core_plan_is_one() -> None:
    plan = read_plan(CORE_PLAN)
    assert {fault.action for part in plan.rounds for fault in part.faults} == {Action.KILL, Action.STOP}


def test_a_rank_is_named_by_its_replica(tmp_path: Path) -> None:
    plan = read_plan(plan_file(tmp_path, {"at": 5, "kill": "rank main-0/2"}))
    (fault,) = plan.rounds[0].faults
    assert (fault.target.kind, fault.target.name, fault.target.rank) == ("rank", "main-0", 2)
    assert plan.rounds[0].title == "kill rank main-0/2"


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"kill": "planet mars"}, "unknown target 'planet mars'"),
        ({"kill": "rank"}, "'rank' takes a name"),
        ({"kill": "leader cp-0"}, "'leader' takes no name"),
        ({"kill": "rank main-0/x"}, "is no number"),
        ({"at": 3}, "a fault names one of kill, stop, terminate, drain"),
        ({"kill": "leader", "stop": "leader"}, "a fault names one of"),
        ({"kill": "leader", "seconds": 3}, "only a stop takes seconds"),
        ({"drain": "leader"}, "only a worker can be drained"),
        ({"kill": "leader", "when": 3}, "rounds.0.faults.0.when"),
        ("leader", "a fault is a mapping"),
    ],
)
def test_what_is_wrong_with_a_fault_is_named(fault: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=problem):
        read_plan(plan_file(tmp_path, fault))


def test_a_plan_that_is_no_yaml_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(path)
    path.write_text("rounds: [")
    with pytest.raises(PlanError, match="is no YAML"):
        read_plan(path)
    path.write_text("")
    with pytest.raises(PlanError, match="the file"):
        read_plan(path)


def wave(*texts: str) -> Load:
    load = Load(["http://a"], len(texts), 8)
    for stream, text in zip(load.streams, texts, strict=True):
        stream.text, stream.finish, stream.times = text, "length", [1.0, 1.5, 3.0]
    return load


def test_each_way_to_differ_is_told() -> None:
    seen = wave("same", "sole", "same", "same")
    seen.streams[2].error = "503: gone"
    seen.streams[3].finish = ""
    found = differing(seen.streams, wave("same", "same", "same", "same").streams)
    assert found == {
        1: "another text, from character 1 on",
        2: "ended after 3 events: 503: gone",
        3: "ended without a finish",
    }


def test_the_report_says_what_failed_and_draws_it(tmp_path: Path) -> None:
    undisturbed = Outcome(title="undisturbed", load=wave("a", "b"), begun=0.5)
    outcome = Outcome(title="kill leader", load=wave("a", "x"), begun=0.5, inflicted=[(1.2, "kill leader")])
    outcome.differing = differing(outcome.load.streams, undisturbed.load.streams)
    outcome.load.new.failed.append("503: nobody")
    path = write_report(Result(undisturbed=undisturbed, rounds=[outcome]), tmp_path / "report")
    text = path.read_text()
    assert "**1 rounds failed.**" in text
    assert "| kill leader | 1 of 2 | 0 of 1 | 1500 | 0 |" in text
    assert "- 0.70 s: fault: kill leader" in text
    assert "- stream 1: another text, from character 0 on" in text
    assert "- a new request failed: 503: nobody" in text
    assert (path.parent / "timeline.png").read_bytes().startswith(b"\x89PNG")
