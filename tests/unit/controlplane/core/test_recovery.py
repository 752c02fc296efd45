"""How replicas end and come back: budget, stages, progress, drains."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from controlplane.core.entities import NodePhase, Replica
from controlplane.core.groups import note_epoch
from controlplane.core.messages import (
    AdminAnswered,
    AdminAsked,
    ApplyAsked,
    AskId,
    DrainAsked,
    Effect,
    Recorded,
    SendGateway,
    SendWorker,
    UndrainAsked,
    WriteDone,
    WritePlacement,
)
from controlplane.runtime.ids import DeploymentId, Epoch, NodeId, ReplicaId, RequestId
from controlplane.runtime.messages.common import RankPhase, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import MoveRequests, ReplicaClosed, RouteBatch, RouteCause
from controlplane.runtime.messages.session import (
    AbortGroup,
    DeviceHealth,
    GroupPhase,
    Heartbeat,
    Leaving,
    LoadProgress,
    LoadReplica,
    PrepareGroup,
    RankState,
)
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import Worker, deployment, entry

M0 = ReplicaId("m-0")


def started(workers: int = 1, replicas: int = 1, tensor: int = 1, devices: int = 1) -> Cluster:
    cluster = Cluster()
    cluster.deployments[DeploymentId("m")] = deployment(replicas=replicas, tensor=tensor)
    cluster.load()
    for index in range(workers):
        worker = cluster.add_worker(f"w{index + 1}", devices)
        cluster.register(worker)
        cluster.attach(worker)
    return cluster


def worker_of(cluster: Cluster, name: str = "w1") -> Worker:
    return cluster.workers[NodeId(name)]


def replica_of(cluster: Cluster, name: str = "m-0") -> Replica:
    return cluster.state.replicas[ReplicaId(name)]


def sent(effects: Iterable[Effect], kind: type) -> list[object]:
    bodies = [effect.body for effect in effects if isinstance(effect, SendWorker | SendGateway)]
    return [body for body in bodies if isinstance(body, kind)]


def recorded(effects: Iterable[Effect]) -> list[str]:
    return [effect.name for effect in effects if isinstance(effect, Recorded)]


def ticks(cluster: Cluster, seconds: float) -> list[Effect]:
    count = round(seconds / cluster.timings.heartbeat_interval)
    return [effect for _ in range(count) for effect in cluster.tick()]


# ---------------------------------------------------------------- coming up


def test_prepare_only_after_the_epoch_is_written() -> None:
    cluster = started()
    (write,) = cluster.writes
    assert isinstance(write, WritePlacement)
    assert write.record.epoch == 1
    assert not worker_of(cluster).inbox or not any(isinstance(one, PrepareGroup) for one in worker_of(cluster).inbox)
    assert sent(cluster.write_next(), PrepareGroup)


def test_a_write_that_fails_is_tried_again_with_its_epoch() -> None:
    cluster = started()
    cluster.etcd_up = False
    assert not sent(cluster.write_next(), PrepareGroup)
    assert replica_of(cluster).phase is ReplicaPhase.CLOSED
    cluster.etcd_up = True
    cluster.tick()
    cluster.settle()
    assert replica_of(cluster).phase is ReplicaPhase.READY
    assert replica_of(cluster).epoch == 1
    assert not replica_of(cluster).failures


@pytest.mark.parametrize("answers", [1, 2])
def test_a_stage_without_an_answer_fails_after_its_deadline(answers: int) -> None:
    cluster = started()
    cluster.write_next()
    for _ in range(answers):
        cluster.answer_next(worker_of(cluster))
    timings = cluster.timings
    limit = timings.stage + (timings.collective_timeout if answers == 1 else 0.0)
    assert "replica_closed" not in recorded(ticks(cluster, limit))
    (abort,) = sent(cluster.tick(), AbortGroup)
    assert isinstance(abort, AbortGroup)
    assert abort.reason.kind is ReasonKind.DEADLINE
    assert "w1" in abort.reason.text


def test_a_load_lives_as_long_as_it_moves() -> None:
    cluster = started()
    cluster.write_next()
    for _ in range(3):
        cluster.answer_next(worker_of(cluster))
    (load,) = [frame for frame in worker_of(cluster).inbox if isinstance(frame, LoadReplica)]
    assert load.deadline_ms == 0
    worker_of(cluster).inbox.clear()
    for step in range(1, 4):
        ticks(cluster, cluster.timings.load_progress)
        progress = LoadProgress(replica=M0, epoch=Epoch(1), stage="weights", fraction=step / 10)
        cluster.say(worker_of(cluster), progress)
        assert replica_of(cluster).phase is ReplicaPhase.LOADING
    ticks(cluster, cluster.timings.load_progress + cluster.timings.heartbeat_interval)
    assert replica_of(cluster).phase is not ReplicaPhase.LOADING


def test_form_waits_for_the_slowest_node() -> None:
    cluster = started(workers=2, tensor=2)
    cluster.write_next()
    first, second = cluster.workers.values()
    for _ in range(2):
        cluster.answer_next(first)
    assert replica_of(cluster).phase is ReplicaPhase.PREPARING
    for _ in range(2):
        cluster.answer_next(second)
    assert replica_of(cluster).phase is ReplicaPhase.FORMING
    assert replica_of(cluster).rendezvous == "w1.host:29500"


def test_failures_are_counted_and_degrade() -> None:
    cluster = started()
    budget = cluster.state.limits.regroup_failures_max
    for attempt in range(1, budget + 1):
        ticks(cluster, cluster.timings.failure_timeout)
        cluster.write_next()
        while worker_of(cluster).held.get(M0) is None or worker_of(cluster).held[M0].epoch != attempt:
            cluster.answer_next(worker_of(cluster))
        cluster.group(worker_of(cluster), M0, GroupPhase.PREPARED, ReasonKind.GROUP_FAILED)
    assert replica_of(cluster).phase is ReplicaPhase.DEGRADED
    ticks(cluster, cluster.timings.regroup_window)
    assert replica_of(cluster).phase is ReplicaPhase.DEGRADED
    fresh = cluster.add_worker("w2")
    cluster.register(fresh)
    assert "replica_pardoned" in recorded(cluster.attach(fresh))


def fail_with(cluster: Cluster, *kinds: ReasonKind) -> None:
    """m-0 fails to prepare, each time for another reason."""
    for kind in kinds:
        while replica_of(cluster).phase is not ReplicaPhase.PREPARING:
            cluster.tick()
            while cluster.writes:
                cluster.write_next()
        worker = worker_of(cluster)
        while worker.held.get(M0) is None or worker.held[M0].epoch != replica_of(cluster).epoch:
            cluster.answer_next(worker)
        cluster.group(worker, M0, GroupPhase.PREPARED, kind)


@pytest.mark.parametrize(
    ("kinds", "phase"),
    [
        ((ReasonKind.LOAD_FAILED,) * 3, ReplicaPhase.FAILED),
        ((ReasonKind.OUT_OF_MEMORY,) * 3, ReplicaPhase.FAILED),
        ((ReasonKind.INVALID, ReasonKind.LOAD_FAILED, ReasonKind.INVALID), ReplicaPhase.FAILED),
        ((ReasonKind.LOAD_FAILED, ReasonKind.GROUP_FAILED, ReasonKind.LOAD_FAILED), ReplicaPhase.DEGRADED),
    ],
)
def test_given_up_for_good_where_each_reason_lasts(kinds: tuple[ReasonKind, ...], phase: ReplicaPhase) -> None:
    cluster = started()
    fail_with(cluster, *kinds)
    assert replica_of(cluster).phase is phase
    ticks(cluster, cluster.timings.regroup_window)
    assert replica_of(cluster).phase is phase


def test_one_failed_replica_of_two_refuses_nothing() -> None:
    cluster = started(replicas=2, devices=1)
    fail_with(cluster, *(ReasonKind.LOAD_FAILED,) * 3)
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    cluster.settle()
    assert replica_of(cluster, "m-1").load.outstanding == {"r1"}


def test_an_operators_wish_pardons_what_failed() -> None:
    cluster = started()
    fail_with(cluster, *(ReasonKind.LOAD_FAILED,) * 3)
    cluster.step(AdminAsked(AskId(1), ApplyAsked(deployment())))
    cluster.settle()
    assert replica_of(cluster).phase is ReplicaPhase.READY


def test_losses_of_a_replica_that_served_cost_no_budget() -> None:
    cluster = started()
    for epoch in range(1, 7):
        cluster.settle()
        assert replica_of(cluster).phase is ReplicaPhase.READY
        assert replica_of(cluster).epoch == epoch
        ticks(cluster, cluster.timings.failure_timeout)
        cluster.rank_exits(worker_of(cluster), "cpu:0")


# ---------------------------------------------------------------- going down


def test_a_rank_that_failed_but_lives_ends_the_epoch_too() -> None:
    cluster = started()
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    reason = Reason(kind=ReasonKind.OUT_OF_MEMORY, text="step 7")
    failed = RankState(
        device="cpu:0",
        pid=200,
        replica=M0,
        epoch=Epoch(1),
        rank=0,
        phase=RankPhase.IDLE,
        reason=reason,
        suspects=(RequestId("r1"),),
    )
    (closed,) = sent(cluster.say(worker_of(cluster), failed), ReplicaClosed)
    assert isinstance(closed, ReplicaClosed)
    assert closed.reason == reason
    assert closed.suspects == ("r1",)


def test_survivors_are_aborted_and_keep_their_devices_warm() -> None:
    cluster = started(workers=2, tensor=2)
    cluster.settle()
    first, second = cluster.workers.values()
    effects = cluster.rank_exits(second, "cpu:0")
    assert len(sent(effects, AbortGroup)) == 2
    assert set(cluster.state.nodes[first.node].held) == {"cpu:0"}
    assert not cluster.state.nodes[second.node].held


def test_a_sick_device_is_left_and_used_again_once_well() -> None:
    cluster = started(devices=2)
    cluster.settle()
    sick = DeviceHealth(device="cpu:0", ok=False, reason=Reason(kind=ReasonKind.DEVICE_SICK, text="Xid 79"))
    cluster.say(worker_of(cluster), Heartbeat(uptime_ms=1, health=(sick,)))
    assert [member.device for member in replica_of(cluster).members] == ["cpu:1"]
    well = DeviceHealth(device="cpu:0", ok=True)
    effects = cluster.say(worker_of(cluster), Heartbeat(uptime_ms=1, health=(well,)))
    assert recorded(effects) == ["device_recovered"]


def test_a_device_whose_rank_starts_is_not_free() -> None:
    cluster = started()
    cluster.settle()
    cluster.rank_exits(worker_of(cluster), "cpu:0")
    assert replica_of(cluster).phase is ReplicaPhase.HELD
    cluster.rank_comes_up(worker_of(cluster))
    assert replica_of(cluster).phase is ReplicaPhase.PLANNED


@pytest.mark.parametrize(
    ("kind", "following"), [(ReasonKind.STORE_UNAVAILABLE, Epoch(1)), (ReasonKind.STALE_EPOCH, Epoch(2))]
)
def test_an_epoch_that_could_not_be_written_is_tried_again_unless_etcd_knows_a_higher_one(
    kind: ReasonKind, following: Epoch
) -> None:
    cluster = started()
    cluster.step(WriteDone(cluster.writes.popleft().write, False, Reason(kind=kind)))
    ticks(cluster, 1)
    assert [write.record.epoch for write in cluster.writes if isinstance(write, WritePlacement)] == [following]


def test_an_epoch_that_could_not_be_written_is_given_up_once_a_higher_one_is_known() -> None:
    cluster = started()
    cluster.step(WriteDone(cluster.writes.popleft().write, False, Reason(kind=ReasonKind.STORE_UNAVAILABLE)))
    note_epoch(cluster.state, M0, Epoch(7))
    ticks(cluster, 1)
    assert [write.record.epoch for write in cluster.writes if isinstance(write, WritePlacement)] == [8]


def test_a_spare_is_taken_at_once() -> None:
    cluster = started(workers=2)
    cluster.settle()
    cluster.rank_exits(worker_of(cluster, "w1"), "cpu:0")
    assert [member.node for member in replica_of(cluster).members] == ["w2"]


def test_progress_is_judged_only_with_work_and_heartbeats() -> None:
    cluster = started()
    cluster.settle()
    worker = worker_of(cluster)
    deadline = cluster.timings.progress_deadline
    worker.loads[M0] = {"stuck": 1}
    ticks(cluster, 3 * deadline)
    worker.loads[M0] = {"stuck": 1, "running": 1}
    worker.stopped = True
    ticks(cluster, deadline)
    assert replica_of(cluster).phase is ReplicaPhase.READY
    worker.stopped = False
    assert "replica_closed" in recorded(ticks(cluster, deadline + 2 * cluster.timings.heartbeat_interval))
    assert replica_of(cluster).epoch == 2


# ---------------------------------------------------------------- in order


def ask(cluster: Cluster, body: DrainAsked | UndrainAsked) -> AdminAnswered:
    effects = cluster.step(AdminAsked(AskId(1), body))
    (answer,) = [effect for effect in effects if isinstance(effect, AdminAnswered)]
    return answer


def test_drain_moves_what_is_left_at_its_deadline() -> None:
    cluster = started()
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    assert ask(cluster, DrainAsked(NodeId("w1"), 2000)).error is None
    assert not sent(ticks(cluster, 1.5), MoveRequests)
    assert len(sent(cluster.tick(), MoveRequests)) == 1
    assert "replica_closed" in recorded(ticks(cluster, cluster.timings.stage))
    assert cluster.state.nodes[NodeId("w1")].phase is NodePhase.LEFT


def test_drain_moves_one_after_another_where_there_is_room() -> None:
    cluster = started(workers=2, replicas=2)
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    names = [RequestId(f"r{index}") for index in range(8)]
    for name in names:
        cluster.tell(gateway, RouteBatch(entries=(entry(name),)))
    running = [name for name in names if name in replica_of(cluster).load.outstanding]
    assert len(running) == 4
    ask(cluster, DrainAsked(NodeId("w1"), 8000))
    moved: list[RequestId] = []
    for passed in range(1, 16):
        for move in sent(cluster.tick(), MoveRequests):
            assert isinstance(move, MoveRequests)
            moved += move.requests
            entries = tuple(entry(name, attempt=2, cause=RouteCause.PLANNED) for name in move.requests)
            cluster.tell(gateway, RouteBatch(entries=entries))
        assert len(moved) == passed // 4
    assert moved == running[:0:-1]


def test_drain_keeps_what_no_other_replica_would_take() -> None:
    cluster = started(workers=1)
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"), entry("r2"))))
    ask(cluster, DrainAsked(NodeId("w1"), 8000))
    assert not sent(ticks(cluster, 7.5), MoveRequests)


def test_undrain_before_the_deadline_goes_on_as_if_nothing_was() -> None:
    cluster = started()
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    ask(cluster, DrainAsked(NodeId("w1"), 0))
    assert replica_of(cluster).phase is ReplicaPhase.DRAINING
    assert ask(cluster, UndrainAsked(NodeId("w1"))).error is None
    assert replica_of(cluster).phase is ReplicaPhase.READY
    assert replica_of(cluster).epoch == 1


def test_a_leaving_node_moves_its_streams_before_its_own_deadline() -> None:
    cluster = started()
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    reason = Reason(kind=ReasonKind.DRAINING, text="SIGTERM")
    cluster.say(worker_of(cluster), Leaving(deadline_ms=10_000, reason=reason))
    assert sent(ticks(cluster, 10.0 - cluster.timings.stage), MoveRequests)
    answer = ask(cluster, UndrainAsked(NodeId("w1")))
    assert answer.error is not None
    assert answer.error.kind is ReasonKind.DRAINING


def test_nobody_can_drain_what_is_not_there() -> None:
    cluster = started()
    answer = ask(cluster, DrainAsked(NodeId("w9"), 0))
    assert answer.error is not None
    assert answer.error.kind is ReasonKind.UNKNOWN_ID


def test_a_draining_node_takes_no_new_replica() -> None:
    cluster = started(workers=1, devices=2)
    cluster.settle()
    ask(cluster, DrainAsked(NodeId("w1"), 0))
    cluster.settle()
    assert replica_of(cluster).phase is ReplicaPhase.HELD
