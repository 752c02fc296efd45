"""Fencing: what belongs to another cluster, term, session or process is refused and counted."""

from __future__ import annotations

import pytest

from controlplane.core.messages import (
    CloseConnection,
    ConnectionId,
    Effect,
    SendWorker,
    StepDown,
    Tick,
    WorkerSaid,
)
from controlplane.runtime.ids import ClusterId, DeploymentId, Epoch, ReplicaId, SessionId, Term
from controlplane.runtime.messages.common import Head, ReasonKind
from controlplane.runtime.messages.session import Fenced, GroupPhase, GroupState, Heartbeat, ReplicaLoad, SessionRefused
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import Worker, deployment


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster(term=5)
    made.deployments[DeploymentId("m")] = deployment()
    made.load()
    worker = made.add_worker("w1")
    made.register(worker)
    made.attach(worker)
    made.settle()
    return made


def worker_of(cluster: Cluster) -> Worker:
    return next(iter(cluster.workers.values()))


def refusals(effects: list[Effect]) -> list[SessionRefused]:
    bodies = [effect.body for effect in effects if isinstance(effect, SendWorker)]
    return [body for body in bodies if isinstance(body, SessionRefused)]


def say(cluster: Cluster, *, term: int = 5, session: int = 1) -> list[Effect]:
    worker = worker_of(cluster)
    assert worker.connection is not None
    head = Head(term=Term(term), session=SessionId(session), seq=99)
    return cluster.step(WorkerSaid(worker.connection, head, Heartbeat(uptime_ms=1)))


def test_frames_of_an_old_term_or_another_session_are_counted(cluster: Cluster) -> None:
    assert say(cluster, term=4) == []
    assert say(cluster, session=2) == []
    assert cluster.state.fenced == {"Heartbeat": 2}


def test_frames_of_an_unknown_stream_are_counted(cluster: Cluster) -> None:
    head = Head(term=Term(5), session=SessionId(1), seq=1)
    assert cluster.step(WorkerSaid(ConnectionId(77), head, Heartbeat(uptime_ms=1))) == []
    assert cluster.state.fenced == {"Heartbeat": 1}


def test_a_frame_of_a_higher_term_ends_the_leadership(cluster: Cluster) -> None:
    (down,) = [effect for effect in say(cluster, term=6) if isinstance(effect, StepDown)]
    assert (down.highest_term, down.pause_s) == (6, 0.0)
    assert cluster.step(Tick()) == []


def test_a_hello_that_saw_a_higher_term_ends_the_leadership(cluster: Cluster) -> None:
    effects = cluster.hello(cluster.add_worker("w2"), highest_term_seen=Term(9))
    assert any(isinstance(effect, StepDown) and effect.highest_term == 9 for effect in effects)


def test_what_a_peer_refused_is_counted_apart(cluster: Cluster) -> None:
    cluster.say(worker_of(cluster), Fenced(frame="AssignBatch", highest_term=Term(5)))
    assert cluster.state.fenced == {"peer:AssignBatch": 1}


def test_another_cluster_is_refused(cluster: Cluster) -> None:
    effects = cluster.hello(cluster.add_worker("w2"), cluster=ClusterId("d" * 32))
    (refused,) = refusals(effects)
    assert refused.reason.kind is ReasonKind.INVALID
    assert any(isinstance(effect, CloseConnection) for effect in effects)


def test_a_name_that_is_held_is_refused_with_its_holder(cluster: Cluster) -> None:
    holder = worker_of(cluster)
    copy = cluster.add_worker("w1")
    (refused,) = refusals(cluster.hello(copy))
    assert refused.reason.kind is ReasonKind.SUPERSEDED
    assert refused.reason.text == "node w1 is pid 100 on w1.host at w1:7000 already"
    assert cluster.state.nodes[holder.node].incarnation == holder.incarnation


def test_a_new_process_takes_the_name_of_one_whose_session_broke(cluster: Cluster) -> None:
    replica = cluster.state.replicas[ReplicaId("m-0")]
    before = replica.epoch
    cluster.break_stream(worker_of(cluster))
    fresh = cluster.add_worker("w1")
    cluster.attach(fresh)
    assert cluster.state.nodes[fresh.node].incarnation == fresh.incarnation
    assert replica.epoch == before + 1


def test_the_newest_session_of_a_process_wins(cluster: Cluster) -> None:
    worker = worker_of(cluster)
    old = worker.connection
    effects = cluster.attach(worker)
    assert any(isinstance(effect, CloseConnection) and effect.connection == old for effect in effects)
    assert cluster.state.nodes[worker.node].link is not None
    assert len(cluster.state.links) == 1


def test_frames_of_another_epoch_are_counted(cluster: Cluster) -> None:
    worker = worker_of(cluster)
    replica = ReplicaId("m-0")
    load = ReplicaLoad(replica=replica, epoch=Epoch(7), free_blocks=1, running=1, waiting=0)
    cluster.say(worker, Heartbeat(uptime_ms=1, replicas=(load,)))
    cluster.say(worker, GroupState(replica=replica, epoch=Epoch(7), phase=GroupPhase.FORMED, ok=True))
    assert cluster.state.fenced == {"ReplicaLoad": 1, "GroupState": 1}
    assert cluster.state.replicas[replica].load.heartbeat is None


def test_an_epoch_heard_of_is_never_used_again(cluster: Cluster) -> None:
    worker = worker_of(cluster)
    replica = ReplicaId("m-0")
    heard = Epoch(cluster.state.replicas[replica].epoch + 7)
    cluster.say(worker, GroupState(replica=replica, epoch=heard, phase=GroupPhase.ABORTED, ok=True))
    cluster.rank_exits(worker, "cpu:0")
    cluster.settle()
    assert cluster.state.replicas[replica].epoch == heard + 1


def test_frames_before_the_snapshot_are_not_taken() -> None:
    cluster = Cluster()
    cluster.load()
    worker = cluster.add_worker("w1")
    cluster.hello(worker)
    stray = GroupState(replica=ReplicaId("m-0"), epoch=Epoch(1), phase=GroupPhase.FORMED, ok=True)
    assert cluster.say(worker, stray) == []
    assert cluster.state.fenced == {"GroupState": 1}


def test_events_before_the_store_was_read_wait_for_it() -> None:
    cluster = Cluster()
    cluster.deployments[DeploymentId("m")] = deployment()
    worker = cluster.add_worker("w1")
    assert cluster.hello(worker) == []
    assert cluster.step(Tick()) == []
    welcomed = [effect for effect in cluster.load() if isinstance(effect, SendWorker)]
    assert len(welcomed) == 1
