"""Desired state: what is refused, what is added, retired, rolled, restored."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.messages import (
    AdminAnswered,
    AdminAsked,
    ApplyAsked,
    AskId,
    DeleteAsked,
    DeletePlacement,
    DeploymentChanged,
    DrainAsked,
    Effect,
    LeaseHeard,
    LeaseMuted,
    ScaleAsked,
    SendGateway,
    UndrainAsked,
    WriteDeployment,
    WritePlacement,
)
from controlplane.core.state import EPOCHS_A_TERM
from controlplane.runtime.ids import DeploymentId, Epoch, NodeId, ReplicaId, RequestId
from controlplane.runtime.messages.common import ParallelDegrees, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import MoveRequests, RouteBatch, RouteCause, RouteCode, RoutedBatch
from controlplane.runtime.records import DeploymentRecord
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import deployment, entry, snapshot_of

M = DeploymentId("m")


def started(replicas: int = 1, devices: int = 2) -> Cluster:
    cluster = Cluster()
    cluster.deployments[M] = deployment(replicas=replicas)
    cluster.load()
    worker = cluster.add_worker("w1", devices)
    cluster.register(worker)
    cluster.attach(worker)
    cluster.settle()
    return cluster


def apply(cluster: Cluster, record: DeploymentRecord) -> list[Effect]:
    effects = cluster.step(AdminAsked(AskId(1), ApplyAsked(record)))
    while cluster.writes:
        effects += cluster.write_next()
    return effects


def answer_of(effects: list[Effect]) -> AdminAnswered:
    (answer,) = [effect for effect in effects if isinstance(effect, AdminAnswered)]
    return answer


def phases(cluster: Cluster) -> dict[str, ReplicaPhase]:
    return {name: replica.phase for name, replica in cluster.state.replicas.items()}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (replace(deployment("Big Model")), "deployment: 'Big Model' is no lower-case DNS label"),
        (replace(deployment("n"), model=""), "model: is empty"),
        (replace(deployment("n"), model="m"), "model: 'm' is served by another deployment"),
        (replace(deployment("n"), replicas=-1), "replicas: is negative"),
        (replace(deployment("n"), max_retries=-1), "max_retries: is negative"),
        (deployment("n", spares=-1), "spares: -1 is not in 0..64"),
        (deployment("n", spares=65), "spares: 65 is not in 0..64"),
        (deployment("n", path=""), "spec.model_path: is empty"),
        (deployment("n", tensor=0), "spec.degrees: must be at least 1"),
        (replace(deployment("n"), spec=deployment("x").spec), "spec.deployment: differs from deployment"),
        (replace(deployment("n"), slow_nodes="flog"), "slow_nodes: 'flog' is none of report, drain"),
        (
            replace(deployment("n"), recovery_strategy="prayer"),
            "recovery_strategy: 'prayer' is none of checkpoint_restart, elastic_scaling",
        ),
    ],
)
def test_a_wrong_deployment_is_refused_with_the_field(wrong: DeploymentRecord, text: str) -> None:
    cluster = started()
    effects = apply(cluster, wrong)
    error = answer_of(effects).error
    assert error is not None
    assert (error.kind, error.text) == (ReasonKind.INVALID, text)
    assert not any(isinstance(effect, WriteDeployment) for effect in effects)


def test_answered_once_written() -> None:
    cluster = started()
    effects = cluster.step(AdminAsked(AskId(1), ApplyAsked(deployment(replicas=2))))
    assert not any(isinstance(effect, AdminAnswered) for effect in effects)
    answer = answer_of(cluster.write_next())
    assert (answer.error, answer.created) == (None, False)
    assert answer_of(apply(cluster, deployment("n", path="/models/n"))).created


def test_a_write_that_fails_changes_nothing() -> None:
    cluster = started()
    cluster.etcd_up = False
    error = answer_of(apply(cluster, deployment(replicas=2))).error
    assert error is not None
    assert error.kind is ReasonKind.STORE_UNAVAILABLE
    assert set(phases(cluster)) == {"m-0"}


def test_frozen_it_is_refused_at_once() -> None:
    cluster = started()
    cluster.step(LeaseMuted())
    error = answer_of(apply(cluster, deployment(replicas=2))).error
    assert error is not None
    assert error.kind is ReasonKind.STORE_UNAVAILABLE


def test_up_and_down() -> None:
    cluster = started()
    apply(cluster, deployment(replicas=2))
    cluster.settle()
    assert phases(cluster) == {"m-0": ReplicaPhase.READY, "m-1": ReplicaPhase.READY}
    effects = apply(cluster, deployment(replicas=1)) + cluster.settle()
    assert phases(cluster) == {"m-0": ReplicaPhase.READY}
    (gone,) = [effect.record for effect in effects if isinstance(effect, WritePlacement)]
    assert (gone.replica, gone.epoch, gone.members) == ("m-1", 1, ())
    assert not cluster.workers[next(iter(cluster.workers))].held.keys() - {"m-0"}


def test_epochs_go_on_after_a_replica_was_gone() -> None:
    cluster = started(2)
    apply(cluster, deployment(replicas=1))
    cluster.settle()
    heir = cluster.successor()
    heir.load()
    heir.attach(heir.workers[next(iter(heir.workers))])
    apply(heir, deployment(replicas=2))
    heir.settle()
    assert heir.state.replicas[ReplicaId("m-1")].epoch > 1


def test_no_epoch_of_an_older_term_comes_again_though_nobody_knows_of_it() -> None:
    """etcd was restored to before the epoch, and the workers that held it are gone."""
    cluster = started()
    used = cluster.state.replicas[ReplicaId("m-0")].epoch
    heir = cluster.successor()
    heir.placements.clear()
    heir.keys.clear()
    heir.workers.clear()
    heir.load()
    worker = heir.add_worker("w2")
    heir.register(worker)
    heir.attach(worker)
    heir.settle()
    epoch = heir.state.replicas[ReplicaId("m-0")].epoch
    assert epoch == EPOCHS_A_TERM * (heir.state.term - 1) + heir.state.epoch_base + 1
    assert epoch > used


def test_a_removed_deployment_leaves_nothing() -> None:
    cluster = started(2)
    gateway = cluster.add_gateway("g1")
    effects = cluster.step(DeploymentChanged(M, None)) + cluster.settle()
    assert sum(isinstance(effect, DeletePlacement) for effect in effects) == 2
    assert not cluster.state.deployments
    assert not cluster.state.replicas
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    assert RequestId("r1") not in cluster.state.requests


def test_a_new_spec_rolls_one_replica_after_the_other() -> None:
    cluster = started(2)
    apply(cluster, deployment(replicas=2, path="/models/new"))
    assert sorted(phase is ReplicaPhase.READY for phase in phases(cluster).values()) == [False, True]
    cluster.settle()
    assert phases(cluster) == {"m-0": ReplicaPhase.READY, "m-1": ReplicaPhase.READY}
    assert [replica.epoch for replica in cluster.state.replicas.values()] == [2, 2]


def test_other_degrees_take_other_devices() -> None:
    cluster = started(1)
    apply(cluster, deployment(tensor=2))
    cluster.settle()
    replica = cluster.state.replicas[ReplicaId("m-0")]
    assert replica.phase is ReplicaPhase.READY
    assert len(replica.members) == 2
    assert replica.spec is not None
    assert replica.spec.degrees == ParallelDegrees(tensor=2)


def test_a_placement_of_nothing_known_is_not_taken_up() -> None:
    cluster = started()
    stray = replace(cluster.placements[ReplicaId("m-0")], replica=ReplicaId("x-0"), deployment=DeploymentId("x"))
    heir = cluster.successor()
    heir.placements[stray.replica] = stray
    heir.load()
    assert set(phases(heir)) == {"m-0"}
    assert heir.state.epochs[ReplicaId("x-0")] == Epoch(1)


def test_a_restored_store_is_told_what_it_forgot() -> None:
    cluster = started()
    record = cluster.placements.pop(ReplicaId("m-0"))
    cluster.load(restored=True)
    cluster.settle()
    assert cluster.placements[ReplicaId("m-0")] == record
    assert phases(cluster) == {"m-0": ReplicaPhase.READY}


def test_what_etcd_forgot_is_told_it_once_the_lease_is_sure() -> None:
    cluster = started()
    record = cluster.placements.pop(ReplicaId("m-0"))
    cluster.step(LeaseMuted())
    cluster.load(restored=True)
    cluster.settle()
    assert ReplicaId("m-0") not in cluster.placements
    assert cluster.state.frozen
    cluster.step(LeaseHeard())
    cluster.settle()
    assert cluster.placements[ReplicaId("m-0")] == record
    cluster.load()
    cluster.settle()
    assert phases(cluster) == {"m-0": ReplicaPhase.READY}


def test_one_that_is_wanted_again_while_it_leaves_has_a_successor() -> None:
    cluster = started(2)
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"), entry("r2"))))
    apply(cluster, deployment(replicas=1))
    assert phases(cluster)["m-1"] is ReplicaPhase.DRAINING, "its request is to move first"
    apply(cluster, deployment(replicas=2))
    for _ in range(round(2 * cluster.timings.stage / cluster.timings.heartbeat_interval)):
        cluster.tick()
        cluster.settle()
    assert phases(cluster) == {"m-0": ReplicaPhase.READY, "m-1": ReplicaPhase.READY}
    assert cluster.state.replicas[ReplicaId("m-1")].epoch == 2


def test_a_new_spec_is_served_by_one_more_before_the_old_one_goes() -> None:
    cluster = started(1)
    apply(cluster, deployment(path="/models/new"))
    assert phases(cluster) == {"m-0": ReplicaPhase.READY, "m-1": ReplicaPhase.PREPARING}
    while cluster.state.replicas[ReplicaId("m-1")].phase is not ReplicaPhase.READY:
        assert phases(cluster)["m-0"] is ReplicaPhase.READY, "somebody serves all along"
        cluster.answer_next(next(iter(cluster.workers.values())))
        while cluster.writes:
            cluster.write_next()
    cluster.settle()
    assert phases(cluster) == {"m-0": ReplicaPhase.READY}
    assert cluster.state.replicas[ReplicaId("m-0")].spec == deployment(path="/models/new").spec


def test_a_drained_nodes_replica_has_a_stand_in_until_it_serves_again() -> None:
    cluster = started(1, devices=1)
    other = cluster.add_worker("w2")
    cluster.register(other)
    cluster.attach(other)
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    node = cluster.state.replicas[ReplicaId("m-0")].nodes[0]
    cluster.step(AdminAsked(AskId(1), DrainAsked(node, deadline_ms=60_000)))
    cluster.settle()
    assert phases(cluster) == {"m-0": ReplicaPhase.DRAINING, "m-1": ReplicaPhase.READY}
    cluster.step(AdminAsked(AskId(2), UndrainAsked(node)))
    cluster.settle()
    assert phases(cluster) == {"m-0": ReplicaPhase.READY}


def test_scaling_changes_nothing_but_the_number() -> None:
    cluster = started(1)
    effects = cluster.step(AdminAsked(AskId(1), ScaleAsked(M, 2)))
    while cluster.writes:
        effects += cluster.write_next()
    assert answer_of(effects).error is None
    cluster.settle()
    assert phases(cluster) == {"m-0": ReplicaPhase.READY, "m-1": ReplicaPhase.READY}
    assert cluster.state.deployments[M].record == deployment(replicas=2)


def test_scaling_what_is_not_there_is_refused() -> None:
    answer = answer_of(started().step(AdminAsked(AskId(1), ScaleAsked(DeploymentId("x"), 2))))
    assert answer.error is not None
    assert answer.error.kind is ReasonKind.UNKNOWN_ID


def test_what_is_created_is_said_so_also_when_the_watch_is_first() -> None:
    cluster = started()
    record = deployment("n", path="/models/n")
    cluster.step(AdminAsked(AskId(1), ApplyAsked(record)))
    cluster.step(DeploymentChanged(record.deployment, record))
    assert answer_of(cluster.write_next()).created


def delete(cluster: Cluster, name: str = "m") -> list[Effect]:
    effects = cluster.step(AdminAsked(AskId(1), DeleteAsked(DeploymentId(name))))
    while cluster.writes:
        effects += cluster.write_next()
    return effects


def test_deleting_is_answered_once_written_and_leaves_nothing() -> None:
    cluster = started(2)
    effects = cluster.step(AdminAsked(AskId(1), DeleteAsked(M)))
    assert not any(isinstance(effect, AdminAnswered) for effect in effects)
    assert M in cluster.state.deployments
    assert answer_of(cluster.write_next()).error is None
    # What the watch says then changes nothing more.
    cluster.step(DeploymentChanged(M, None))
    cluster.settle()
    assert not cluster.deployments
    assert not cluster.state.deployments
    assert not cluster.placements
    assert answer_of(apply(cluster, deployment())).created


def test_requests_of_a_deleted_deployment_are_refused() -> None:
    """Those that run are moved, which asks for them anew; those that wait hear it at once."""
    cluster = started(1)
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("runs"),)))
    waiting = tuple(entry(f"waits{place}") for place in range(64))
    cluster.tell(gateway, RouteBatch(entries=waiting))
    waits = [name for name, request in cluster.state.requests.items() if request.permit is None]
    assert waits
    effects = delete(cluster)
    assert any(isinstance(effect, SendGateway) and isinstance(effect.body, MoveRequests) for effect in effects)
    moved = entry("runs", attempt=2, cause=RouteCause.PLANNED)
    effects += cluster.tell(gateway, RouteBatch(entries=(moved, entry("new"))))
    assert refused(effects) == dict.fromkeys([*waits, "runs", "new"], RouteCode.UNKNOWN_DEPLOYMENT)


def refused(effects: list[Effect]) -> dict[RequestId, RouteCode]:
    batches = [effect.body for effect in effects if isinstance(effect, SendGateway)]
    return {one.request: one.code for batch in batches if isinstance(batch, RoutedBatch) for one in batch.refused}


def test_deleting_what_is_not_there_is_refused() -> None:
    cluster = started()
    answer = answer_of(delete(cluster, "x"))
    assert answer.error == Reason(kind=ReasonKind.UNKNOWN_ID, text="no deployment x")
    assert M in cluster.deployments
    assert answer_of(delete(cluster)).error is None
    assert answer_of(delete(cluster)).error == Reason(kind=ReasonKind.UNKNOWN_ID, text="no deployment m")


def test_deleting_without_etcd_changes_nothing() -> None:
    cluster = started()
    cluster.etcd_up = False
    errors = [answer_of(delete(cluster)).error]
    cluster.step(LeaseMuted())
    errors.append(answer_of(delete(cluster)).error)
    assert [error.kind for error in errors if error] == [ReasonKind.STORE_UNAVAILABLE] * 2
    assert phases(cluster) == {"m-0": ReplicaPhase.READY}


def test_ranks_meet_at_the_address_of_their_node_and_not_at_what_its_machine_calls_itself() -> None:
    cluster = started(replicas=0)
    worker = cluster.workers[NodeId("w1")]
    cluster.hello(worker, serve_address="[fd00::1]:7800")
    cluster.say(worker, snapshot_of(worker))
    made = [effect for effect in apply(cluster, deployment(replicas=1)) if isinstance(effect, WritePlacement)]
    assert [member.host for member in made[0].record.members] == ["fd00::1"]
