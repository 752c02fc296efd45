"""Plans of faults, verdicts, and the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tools.chaos.command import CORE_PLAN, FULL_PLAN
from tools.chaos.fault import Action, Fault
from tools.chaos.faults import losses_of
from tools.chaos.load import Load, Stream
from tools.chaos.network import Loss
from tools.chaos.plan import PlanError, pick, read_plans
from tools.chaos.report import REPORT, write_report
from tools.chaos.rounds import Outcome, Result, differing


def plan_file(folder: Path, *faults: object, **sections: object) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"rounds": [{"faults": list(faults)}], **sections}))
    return path


def test_the_core_plan_is_one() -> None:
    (plan,) = read_plans(CORE_PLAN)
    assert {fault.action for part in plan.rounds for fault in part.faults} == {Action.KILL, Action.STOP}


def test_the_full_plan_has_every_kind_of_fault() -> None:
    plans = read_plans(FULL_PLAN)
    rounds = [part for plan in plans for part in plan.rounds]
    used = {fault.action for part in rounds for fault in part.faults}
    assert all(plan.hosts is not None and plan.name for plan in plans)
    assert set(Action) - used == {Action.DRAIN, Action.TERMINATE}, "which a restart of everything does"
    assert len({part.title for part in rounds}) == len(rounds)


def test_rounds_are_picked_by_their_name() -> None:
    plans = read_plans(FULL_PLAN)
    (plan,) = pick(plans, ["zygote"])
    assert [part.title for part in plan.rounds] == ["zygote killed"]
    with pytest.raises(PlanError, match="no round of the plan is called 'mars'"):
        pick(plans, ["zygote", "mars"])


def test_several_clusters_stand_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    hosts = "hosts: {workers: 4, settings: {parallelism: {tensor_parallel_size: 2}}}\n"
    rounds = "rounds: [{faults: [{kill: leader}]}]\n"
    others = "rounds: [{faults: [{kill: nodes main-0, seconds: 3}]}]\n"
    path.write_text(f"{hosts}{rounds}---\nhosts: {{}}\n{others}")
    assert [plan.hosts.workers for plan in read_plans(path) if plan.hosts] == [4, 2]
    path.write_text(f"{hosts}{rounds}---\n{rounds}")
    with pytest.raises(PlanError, match="each of several plans needs a cluster of its own"):
        read_plans(path)
    path.write_text(f"{hosts}{rounds}---\n{others}")
    with pytest.raises(PlanError, match="plan 2: the file: 'kill nodes main-0 for 3 s' needs hosts"):
        read_plans(path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"cluster": {}}, "the section cluster follows from the hosts"),
        ({"parallelism": {"tensor": 2}}, "settings.parallelism.tensor: Extra inputs"),
    ],
)
def test_settings_of_a_cluster_are_those_of_its_file(settings: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=problem):
        read_plans(plan_file(tmp_path, {"kill": "leader"}, hosts={"settings": settings}))


def test_hosts_are_demanded_by_what_needs_them(tmp_path: Path) -> None:
    cut = {"cut": "leader", "from": "etcd", "seconds": 5}
    with pytest.raises(PlanError, match="'cut leader from etcd for 5 s' needs hosts"):
        read_plans(plan_file(tmp_path, cut))
    (plan,) = read_plans(plan_file(tmp_path, cut, hosts={"etcd": 3}))
    assert plan.rounds[0].faults[0].peers == "etcd"


@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        ({"cut": "worker w", "seconds": 1}, [Loss("w", "a"), Loss("a", "w"), Loss("w", "b"), Loss("b", "w")]),
        ({"mute": "worker w", "seconds": 1}, [Loss("w", "a"), Loss("w", "b")]),
        ({"deafen": "worker w", "seconds": 1}, [Loss("a", "w"), Loss("b", "w")]),
    ],
)
def test_what_a_fault_of_a_cable_loses(fault: object, lost: list[Loss]) -> None:
    assert losses_of(Fault.model_validate(fault), "w", ["w", "a", "b"]) == lost


def test_a_rank_is_named_by_its_replica(tmp_path: Path) -> None:
    (plan,) = read_plans(plan_file(tmp_path, {"at": 5, "kill": "rank main-0/2"}))
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
        ({"at": 3}, "a fault names one of kill, stop, terminate, drain, undrain, cut"),
        ({"kill": "leader", "stop": "leader"}, "a fault names one of"),
        ({"terminate": "leader", "seconds": 3}, "'terminate' takes no seconds"),
        ({"kill": "rank main-0", "seconds": 3}, "only a daemon stays away for seconds, not a rank"),
        ({"drain": "leader"}, "leader cannot be met by 'drain': node, nodes, worker"),
        ({"cut": "leader"}, "'cut' takes seconds"),
        ({"slow": "rank main-0", "seconds": 3}, "'slow' takes a percent below 100"),
        ({"cut": "etcd", "seconds": 3}, "takes one member of etcd by its name"),
        ({"kill": "leader", "from": "etcd"}, "'kill' takes no from"),
        ({"kill": "leader", "when": "sleeping main-0"}, "rounds.0.faults.0.when"),
        ("leader", "a fault is a mapping"),
    ],
)
def test_what_is_wrong_with_a_fault_is_named(fault: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=problem):
        read_plans(plan_file(tmp_path, fault))


def test_a_plan_that_is_no_yaml_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    with pytest.raises(PlanError, match="cannot be read"):
        read_plans(path)
    path.write_text("rounds: [")
    with pytest.raises(PlanError, match="is no YAML"):
        read_plans(path)
    path.write_text("")
    with pytest.raises(PlanError, match="the file"):
        read_plans(path)


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
    seen.streams.append(Stream(0, text="sane", finish="length"))
    again = differing(seen.streams, wave("same", "same", "same", "same").streams)
    assert again.keys() - found.keys() == {4}, "a later stream of a number has the same reference"
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
    outcome.problems.append("not whole")
    folder = tmp_path / "report"
    write_report([Result(name="two workers", undisturbed=undisturbed, rounds=[outcome])], folder)
    text = (folder / REPORT).read_text()
    assert "**1 of 1 rounds failed.**" in text
    assert "|  | *two workers: undisturbed* | ok | 2 of 2 | 0 of 0 | 1500 |" in text
    assert "| 1 | kill leader | FAILED | 1 of 2 | 0 of 1 | 1500 | 0 | none | never |" in text
    assert "- 0.70 s: **kill leader**" in text
    assert "- wrong: not whole" in text
    assert "- wrong: stream 1: another text, from character 0 on" in text
    assert "- wrong: a new request failed: 503: nobody" in text
    assert (folder / "round-01.png").read_bytes().startswith(b"\x89PNG")
