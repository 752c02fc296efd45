"""/ready tells the truth."""

from __future__ import annotations

from dataclasses import replace

from controlplane.gateway.messages import LeaderSaid, WorkerKey
from controlplane.gateway.readiness import readiness
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.messages.route import LeaderHeartbeat, ReplicaTable
from tests.unit.controlplane.gateway.builders import TIMINGS, W1, Core, row, tokens


def ready(core: Core, *, leaderless_for: float = 0.0, heard_ago: float | None = 0.0) -> tuple[bool, str]:
    def heard_at(worker: WorkerKey) -> float | None:
        assert worker == W1
        return None if heard_ago is None else core.now - heard_ago

    return readiness(core.state, core.now, leaderless_for=leaderless_for, heard_at=heard_at)


def told(phase: ReplicaPhase = ReplicaPhase.READY) -> Core:
    core = Core()
    core.running()
    core.do(LeaderSaid(ReplicaTable(full=True, rows=(replace(row(), phase=phase),))))
    return core


def test_an_idle_replica_whose_daemon_answers_is_ready():
    assert ready(told()) == (True, f"replica r-{W1} can serve")


def test_without_a_replica_it_says_what_there_is():
    assert ready(Core()) == (False, "no replica exists")
    assert ready(told(ReplicaPhase.LOADING)) == (False, "no replica is ready (loading)")


def test_a_silent_daemon_is_not_ready():
    assert not ready(told(), heard_ago=TIMINGS.session_silence + 0.1)[0]
    assert not ready(told(), heard_ago=None)[0]


def test_a_replica_that_decodes_must_move():
    core = told()
    core.do(tokens(core.slots()[0], 0, [5]))
    core.now += TIMINGS.failure_timeout - 0.1
    assert ready(core)[0]
    core.now += 0.2
    assert ready(core) == (False, f"replica r-{W1} has made no progress for 3.1 s")


def test_a_replica_that_prefills_is_judged_by_its_leader():
    core = told()
    core.now += 10 * TIMINGS.failure_timeout
    assert ready(core)[0]


def test_without_a_leader_it_serves_with_the_replicas_that_it_knows_and_says_so():
    long = TIMINGS.session_silence + 0.1
    assert ready(told(), leaderless_for=long) == (True, f"replica r-{W1} can serve; no leading coordinator for 1.6 s")
    assert ready(Core(), leaderless_for=long) == (False, "no replica exists; no leading coordinator for 1.6 s")
    assert ready(told(), leaderless_for=TIMINGS.session_silence - 0.1) == (True, f"replica r-{W1} can serve")


def test_a_leader_that_cannot_reach_etcd_is_told_of():
    core = told()
    core.do(LeaderSaid(LeaderHeartbeat(frozen=True)))
    serves, why = ready(core)
    assert serves
    assert why.endswith("cannot use etcd: it routes, but places nothing")
