"""The timeline of failures: which steps came, when, and for whom."""

from __future__ import annotations

from controlplane.core.failure import Failure, FailurePhase
from controlplane.core.messages import AdminAsked, AskId, DrainAsked, Recorded
from controlplane.core.views import failures_view
from controlplane.runtime.ids import Attempt, DeploymentId, Epoch, ReplicaId, RequestId
from controlplane.runtime.messages.common import ReasonKind
from controlplane.runtime.messages.route import (
    EndBatch,
    EndEntry,
    FirstToken,
    FirstTokens,
    Outcome,
    ReplicaEpoch,
    RouteBatch,
    RouteCause,
)
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import GatewayPeer, Worker, deployment, entry

M0 = ReplicaId("m-0")


def serving(workers: int = 2) -> tuple[Cluster, GatewayPeer, list[Worker]]:
    cluster = Cluster()
    cluster.deployments[DeploymentId("m")] = deployment(replicas=workers)
    cluster.load()
    made = [cluster.add_worker(f"w{index}") for index in range(workers)]
    for worker in made:
        cluster.register(worker)
        cluster.attach(worker)
    cluster.settle()
    return cluster, cluster.add_gateway("g1"), made


def asked(cluster: Cluster, gateway: GatewayPeer, request: str, **fields: object) -> ReplicaEpoch:
    """Route the request; where it runs."""
    cluster.tell(gateway, RouteBatch(entries=(entry(request, **fields),)))
    permit = cluster.state.requests[RequestId(request)].permit
    assert permit is not None
    return ReplicaEpoch(replica=permit.replica, epoch=permit.epoch)


def worker_of(cluster: Cluster, place: ReplicaEpoch, workers: list[Worker]) -> Worker:
    node = cluster.state.replicas[place.replica].nodes[0]
    return next(worker for worker in workers if worker.node == node)


def one(cluster: Cluster) -> Failure:
    (failure,) = cluster.state.failures.records
    return failure


def test_a_rank_that_dies_is_followed_to_the_first_token() -> None:
    cluster, gateway, workers = serving()
    place = asked(cluster, gateway, "r1")
    worker = worker_of(cluster, place, workers)
    cluster.rank_exits(worker, "cpu:0")
    failure = one(cluster)
    assert failure.phases.keys() == {FailurePhase.CLOSED}
    assert failure.homeless == {"r1"}
    asked(cluster, gateway, "r1", attempt=2, cause=RouteCause.LOST, exclude=(place,))
    assert FailurePhase.REPLAYED in failure.phases
    assert (failure.homeless, failure.silent) == (set(), {"r1"})
    token = FirstToken(request=RequestId("r1"), attempt=Attempt(2), gap_ms=120)
    cluster.tell(gateway, FirstTokens(entries=(token,)))
    assert not failure.over, "the replica is still to come back"
    cluster.rank_comes_up(worker)
    cluster.settle()
    assert failure.over
    assert failure.phases.keys() == set(FailurePhase)
    assert (failure.next_epoch, failure.gap_ms_max) == (place.epoch + 1, 120)
    (view,) = failures_view(cluster.state, cluster.state.now)
    assert (view.replica, view.over, view.requests, view.silent) == (place.replica, True, 1, 0)


def test_the_whole_timeline_is_told_once() -> None:
    cluster, gateway, workers = serving()
    place = asked(cluster, gateway, "r1")
    worker = worker_of(cluster, place, workers)
    cluster.rank_exits(worker, "cpu:0")
    cluster.tell(gateway, EndBatch(entries=(_end("r1"),)))
    effects = cluster.rank_comes_up(worker) + cluster.settle()
    (told,) = [one for one in effects if isinstance(one, Recorded) and one.name == "failure_recovered"]
    assert {
        "ended_epoch",
        "closed_s",
        "fenced_s",
        "regrouped_s",
        "replayed_s",
        "requests",
        "gap_ms_max",
    } == told.details.keys()


def _end(request: str) -> EndEntry:
    return EndEntry(request=RequestId(request), attempt=Attempt(1), outcome=Outcome.CANCELLED, tokens=0)


def test_a_gateway_may_bring_the_first_news() -> None:
    cluster, gateway, workers = serving()
    place = asked(cluster, gateway, "r1")
    asked(cluster, gateway, "r1", attempt=2, cause=RouteCause.UNREACHABLE, exclude=(place,))
    noticed = one(cluster).noticed
    cluster.tick()
    cluster.kill(worker_of(cluster, place, workers))
    cluster.settle()
    failure = one(cluster)
    assert (failure.noticed, failure.lost) == (noticed, {"r1"})
    assert failure.reason.kind is ReasonKind.CONNECTION_REFUSED


def test_a_planned_end_is_no_failure() -> None:
    cluster, gateway, workers = serving()
    place = asked(cluster, gateway, "r1")
    node = worker_of(cluster, place, workers).node
    cluster.step(AdminAsked(AskId(1), DrainAsked(node, deadline_ms=1)))
    asked(cluster, gateway, "r1", attempt=2, cause=RouteCause.PLANNED, exclude=(place,))
    assert not cluster.state.replicas[place.replica].holds_devices
    assert not cluster.state.failures.records


def test_a_failure_after_a_return_has_a_time_of_its_own() -> None:
    cluster, gateway, workers = serving()
    place = asked(cluster, gateway, "r1")
    worker = worker_of(cluster, place, workers)
    cluster.break_stream(worker)
    cluster.tick()
    cluster.attach(worker)
    assert not cluster.state.failures.records, "a broken session alone is no failure"
    cluster.tick()
    cluster.rank_exits(worker, "cpu:0")
    assert one(cluster).noticed == cluster.state.now


def test_a_link_that_was_mended_is_another_failure_than_a_later_death() -> None:
    cluster, gateway, workers = serving()
    place = asked(cluster, gateway, "r1")
    asked(cluster, gateway, "r1", attempt=2, cause=RouteCause.UNREACHABLE, exclude=(place,))
    cluster.tell(gateway, FirstTokens(entries=(FirstToken(request=RequestId("r1"), attempt=Attempt(2), gap_ms=5),)))
    for _ in range(10):
        cluster.tick()
    cluster.rank_exits(worker_of(cluster, place, workers), "cpu:0")
    link, death = cluster.state.failures.records
    assert (link.epoch, death.epoch, death.noticed) == (place.epoch, place.epoch, cluster.state.now)
    assert FailurePhase.CLOSED not in link.phases
    assert FailurePhase.CLOSED in death.phases


def test_a_request_lost_twice_waits_for_its_last_loss() -> None:
    cluster, gateway, _ = serving(3)
    first = asked(cluster, gateway, "r1")
    second = asked(cluster, gateway, "r1", attempt=2, cause=RouteCause.LOST, exclude=(first,))
    asked(cluster, gateway, "r1", attempt=3, cause=RouteCause.LOST, exclude=(first, second))
    earlier, later = cluster.state.failures.records
    assert (earlier.epoch, earlier.silent) == (Epoch(1), set())
    assert later.silent == {"r1"}
