"""What is believed of nodes: leases, sessions, silence, proof."""

from __future__ import annotations

import pytest

from controlplane.core.entities import LeaderPhase, NodePhase
from controlplane.core.messages import (
    Effect,
    LeaseHeard,
    LeaseMuted,
    NodeKeyChanged,
    Probe,
    ProbeDone,
    RevokeDone,
    RevokeLease,
    SendWorker,
)
from controlplane.runtime.ids import DeploymentId, NodeId
from controlplane.runtime.messages.session import Relet
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import Worker, deployment

W1 = NodeId("w1")


def led(workers: int = 1) -> Cluster:
    """A leader past its grace, with live workers."""
    cluster = Cluster()
    cluster.deployments[DeploymentId("m")] = deployment(replicas=workers)
    cluster.load()
    for index in range(workers):
        worker = cluster.add_worker(f"w{index + 1}")
        cluster.register(worker)
        cluster.attach(worker)
    cluster.settle()
    ticks(cluster, cluster.timings.leader_grace)
    assert cluster.state.phase is LeaderPhase.LEADING
    return cluster


def ticks(cluster: Cluster, seconds: float) -> list[Effect]:
    count = round(seconds / cluster.timings.heartbeat_interval)
    return [effect for _ in range(count) for effect in cluster.tick()]


def phase(cluster: Cluster, name: NodeId = W1) -> NodePhase:
    return cluster.state.nodes[name].phase


def worker_of(cluster: Cluster) -> Worker:
    return cluster.workers[W1]


def test_silence_alone_never_kills() -> None:
    cluster = led()
    worker_of(cluster).stopped = True
    ticks(cluster, cluster.timings.session_silence)
    assert phase(cluster) is NodePhase.UNREACHABLE
    effects = ticks(cluster, 100 * cluster.timings.failure_timeout)
    assert phase(cluster) is NodePhase.UNREACHABLE
    assert not any(isinstance(effect, RevokeLease) for effect in effects)


def test_a_frame_ends_silence() -> None:
    cluster = led()
    worker_of(cluster).stopped = True
    ticks(cluster, cluster.timings.session_silence)
    worker_of(cluster).stopped = False
    cluster.tick()
    assert phase(cluster) is NodePhase.LIVE


def test_a_lease_gone_under_silence_is_death() -> None:
    cluster = led()
    worker_of(cluster).stopped = True
    ticks(cluster, cluster.timings.session_silence)
    cluster.lease_gone(W1)
    assert phase(cluster) is NodePhase.LOST


def test_silence_under_a_lease_gone_is_death() -> None:
    cluster = led()
    cluster.lease_gone(W1)
    assert phase(cluster) is NodePhase.LIVE
    worker_of(cluster).stopped = True
    ticks(cluster, cluster.timings.session_silence)
    assert phase(cluster) is NodePhase.LOST


def test_a_lease_gone_under_a_live_session_is_a_relet() -> None:
    cluster = led()
    effects = cluster.lease_gone(W1)
    assert any(isinstance(effect, SendWorker) and isinstance(effect.body, Relet) for effect in effects)
    assert phase(cluster) is NodePhase.LIVE
    cluster.register(worker_of(cluster))
    assert cluster.state.nodes[W1].leased


def test_a_late_tick_forgives_everybody() -> None:
    cluster = led()
    worker_of(cluster).stopped = True
    for _ in range(20):
        cluster.tick(4 * cluster.timings.heartbeat_interval)
    assert phase(cluster) is NodePhase.LIVE


def test_proof_revokes_exactly_that_lease_once() -> None:
    cluster = led()
    lease = worker_of(cluster).lease
    cluster.kill(worker_of(cluster))
    (revoke,) = [effect for effect in cluster.probe_next() if isinstance(effect, RevokeLease)]
    assert (revoke.node, revoke.lease_id) == (W1, lease)
    assert not any(isinstance(effect, RevokeLease) for effect in ticks(cluster, 1.0))
    cluster.revoke_next()
    assert phase(cluster) is NodePhase.LOST


def test_a_connect_that_succeeds_proves_nothing_and_is_tried_again() -> None:
    cluster = led()
    effects = cluster.break_stream(worker_of(cluster))
    assert any(isinstance(effect, Probe) for effect in effects)
    assert not any(isinstance(effect, RevokeLease) for effect in cluster.probe_next())
    assert any(isinstance(effect, Probe) for effect in cluster.tick())


def test_no_probe_of_a_process_that_never_worked_here() -> None:
    cluster = led()
    fresh = cluster.add_worker("w2")
    cluster.register(fresh)
    cluster.hello(fresh)
    assert not any(isinstance(effect, Probe) for effect in cluster.break_stream(fresh))


def test_a_probe_from_before_the_return_proves_nothing() -> None:
    cluster = led()
    worker = worker_of(cluster)
    cluster.break_stream(worker)
    cluster.attach(worker)
    cluster.break_stream(worker)
    effects = cluster.step(ProbeDone(W1, worker.incarnation, refused=True))
    assert effects == []


def test_a_revoke_that_failed_is_asked_again() -> None:
    cluster = led()
    worker = worker_of(cluster)
    cluster.kill(worker)
    cluster.probe_next()
    cluster.step(RevokeDone(W1, worker.incarnation, ok=False))
    assert any(isinstance(effect, RevokeLease) for effect in cluster.tick())


def test_another_incarnation_ends_the_old_one() -> None:
    cluster = led()
    old = cluster.state.nodes[W1]
    cluster.kill(worker_of(cluster))
    fresh = cluster.add_worker("w1")
    cluster.register(fresh)
    assert old.phase is NodePhase.LOST
    cluster.attach(fresh)
    assert phase(cluster) is NodePhase.LIVE


def test_the_end_of_a_predecessors_key_says_nothing_of_a_newcomer() -> None:
    cluster = led()
    cluster.kill(worker_of(cluster))
    fresh = cluster.add_worker("w1")
    cluster.attach(fresh)
    assert cluster.step(NodeKeyChanged(W1, None)) == []
    assert cluster.state.nodes[W1].leased


def test_absence_counts_only_after_grace() -> None:
    cluster = led(2)
    heir = cluster.successor()
    heir.load()
    heir.lease_gone(W1)
    assert phase(heir) is NodePhase.KNOWN
    ticks(heir, heir.timings.leader_grace)
    assert phase(heir) is NodePhase.LOST
    assert phase(heir, NodeId("w2")) is NodePhase.KNOWN


def test_frozen_neither_revokes_nor_forgets_the_proof() -> None:
    cluster = led()
    cluster.step(LeaseMuted())
    cluster.kill(worker_of(cluster))
    assert not any(isinstance(effect, RevokeLease) for effect in cluster.settle() + ticks(cluster, 2.0))
    cluster.step(LeaseHeard())
    assert any(isinstance(effect, RevokeLease) for effect in cluster.tick())


@pytest.mark.parametrize("peers", [(), ("cp2",)])
def test_a_leader_cut_off_resigns_only_if_another_can_lead(peers: tuple[str, ...]) -> None:
    cluster = led(3)
    cluster.load(peers=peers)
    for worker in list(cluster.workers.values())[:2]:
        cluster.break_stream(worker)
    for _ in range(20):
        cluster.settle()
        cluster.tick()
    assert cluster.state.over == bool(peers)


def test_the_dead_are_forgotten_in_time() -> None:
    cluster = led()
    cluster.kill(worker_of(cluster))
    cluster.settle()
    ticks(cluster, cluster.timings.regroup_window + 1.0)
    assert W1 not in cluster.state.nodes
