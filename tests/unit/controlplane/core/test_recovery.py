"""How replicas end and come back: budget, stages, progress, drains."""

from __future__ import annotations

import pytest

from controlplane.core.groups import note_epoch
from controlplane.core.messages import (
    AdminAsked,
    ApplyAsked,
    AskId,
    WriteDone,
    WritePlacement,
)
from controlplane.runtime.ids import Epoch, ReplicaId, RequestId
from controlplane.runtime.messages.common import RankPhase, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import ReplicaClosed, RouteBatch
from controlplane.runtime.messages.session import (
    AbortGroup,
    DeviceHealth,
    GroupPhase,
    Heartbeat,
    LoadProgress,
    LoadReplica,
    PrepareGroup,
    RankState,
)
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import deployment, entry
from tests.unit.controlplane.core.acting import recorded, replica_of, sent, started, ticks, worker_of

M0 = ReplicaId("m-0")


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
