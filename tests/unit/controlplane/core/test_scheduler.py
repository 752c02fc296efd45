"""Routing decisions: who is refused, who waits, who runs where."""

from __future__ import annotations

from controlplane.core.desired import change
from controlplane.core.entities import Limits
from controlplane.core.messages import Effect, SendGateway, SendWorker
from controlplane.runtime.ids import Attempt, DeploymentId, Epoch, ReplicaId, RequestId
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.messages.route import (
    EndBatch,
    EndEntry,
    Outcome,
    ReplicaEpoch,
    RouteBatch,
    RouteCause,
    RouteCode,
    Routed,
    RoutedBatch,
    RouteEntry,
    RouteRefused,
)
from controlplane.runtime.messages.session import AssignBatch, AssignLapsed
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import CAPACITY, GatewayPeer, deployment, entry

WINDOW = 2 * CAPACITY.max_sequences


def serving(workers: int = 2, *, limits: Limits | None = None) -> tuple[Cluster, GatewayPeer]:
    """A cluster whose replicas m-0, m-1, … are READY on w1, w2, …"""
    cluster = Cluster(limits=limits)
    cluster.deployments[DeploymentId("m")] = deployment(replicas=max(1, workers))
    cluster.load()
    for index in range(workers):
        worker = cluster.add_worker(f"w{index + 1}")
        cluster.register(worker)
        cluster.attach(worker)
    cluster.settle()
    return cluster, cluster.add_gateway("g1")


Answers = tuple[dict[str, Routed], dict[str, RouteRefused]]


def route(cluster: Cluster, gateway: GatewayPeer, *entries: RouteEntry) -> Answers:
    return answers(cluster.tell(gateway, RouteBatch(entries=entries)))


def answers(effects: list[Effect]) -> Answers:
    batches = [effect.body for effect in effects if isinstance(effect, SendGateway)]
    batches = [body for body in batches if isinstance(body, RoutedBatch)]
    routed = {one.permit.request: one for batch in batches for one in batch.routed}
    refused = {one.request: one for batch in batches for one in batch.refused}
    return routed, refused


def where(routed: dict[str, Routed]) -> dict[str, str]:
    return {request: one.permit.replica for request, one in routed.items()}


def at(index: int, epoch: int = 1) -> ReplicaEpoch:
    return ReplicaEpoch(replica=ReplicaId(f"m-{index}"), epoch=Epoch(epoch))


def test_permit_goes_to_worker_and_gateway_alike() -> None:
    cluster, gateway = serving(1)
    effects = cluster.tell(gateway, RouteBatch(entries=(entry("r1", priority=3),)))
    assigns = [effect.body for effect in effects if isinstance(effect, SendWorker)]
    routed, _ = answers(effects)
    assert assigns == [AssignBatch(permits=(routed["r1"].permit,))]
    assert routed["r1"].permit.priority == 3
    assert routed["r1"].serve_address == "w1:7000"


def test_a_batch_spreads() -> None:
    cluster, gateway = serving(2)
    routed, _ = route(cluster, gateway, *(entry(f"r{index}") for index in range(4)))
    assert sorted(where(routed).values()) == ["m-0", "m-0", "m-1", "m-1"]


def test_a_slow_replica_gets_less() -> None:
    cluster, gateway = serving(2)
    w1, w2 = cluster.workers.values()
    w1.loads[ReplicaId("m-0")] = {"step_ms": 100.0, "running": 1}
    w2.loads[ReplicaId("m-1")] = {"step_ms": 10.0, "running": 1}
    cluster.beat(w1)
    cluster.beat(w2)
    routed, _ = route(cluster, gateway, *(entry(f"r{index}") for index in range(4)))
    assert sorted(where(routed).values()).count("m-1") >= 3


def test_requests_with_a_common_prefix_meet() -> None:
    cluster, gateway = serving(2)
    hashes = tuple(range(1, 100))
    first, _ = route(cluster, gateway, entry("r1", prompt=1600, max_tokens=4, prefix_hashes=hashes))
    cluster.settle()
    cluster.tick()
    second, _ = route(cluster, gateway, entry("r2", prompt=1600, max_tokens=4, prefix_hashes=hashes))
    other, _ = route(cluster, gateway, entry("r3", prompt=1600, max_tokens=4))
    assert where(first)["r1"] == where(second)["r2"] != where(other)["r3"]


def test_the_window_bounds_what_a_replica_is_given() -> None:
    cluster, gateway = serving(1)
    routed, refused = route(cluster, gateway, *(entry(f"r{index}") for index in range(WINDOW + 3)))
    assert len(routed) == WINDOW
    assert not refused
    assert len(cluster.state.deployments[DeploymentId("m")].queue) == 3


def test_what_ends_lets_the_next_in() -> None:
    cluster, gateway = serving(1)
    route(cluster, gateway, *(entry(f"r{index}") for index in range(WINDOW)))
    route(cluster, gateway, entry("low", priority=-1), entry("high", priority=1))
    cluster.settle()
    cluster.workers[next(iter(cluster.workers))].assigned.popitem()
    routed, _ = answers(cluster.tick())
    assert list(routed) == ["high"]


def test_a_wide_request_is_not_starved() -> None:
    cluster, gateway = serving(1)
    route(cluster, gateway, *(entry(f"r{index}") for index in range(WINDOW - 1)))
    routed, _ = route(cluster, gateway, entry("wide", n=4), entry("later"))
    assert not routed
    cluster.settle()
    worker = cluster.workers[next(iter(cluster.workers))]
    for _ in range(3):
        worker.assigned.popitem()
    routed, _ = answers(cluster.tick())
    assert list(routed) == ["wide"]


def test_more_choices_than_the_window_go_to_an_idle_replica() -> None:
    cluster, gateway = serving(1)
    routed, _ = route(cluster, gateway, entry("huge", n=WINDOW + 5))
    assert list(routed) == ["huge"]


def test_the_excluded_is_avoided_while_there_is_another() -> None:
    cluster, gateway = serving(2)
    for index in range(6):
        routed, _ = route(cluster, gateway, entry(f"r{index}", exclude=(at(0),)))
        assert set(where(routed).values()) == {"m-1"}


def test_the_only_replica_is_tried_again_but_not_at_once() -> None:
    cluster, gateway = serving(1)
    routed, _ = route(cluster, gateway, entry("r1", exclude=(at(0),)))
    assert not routed
    routed, _ = answers(cluster.tick())
    assert where(routed) == {"r1": "m-0"}


def test_those_behind_a_stuck_one_go_on() -> None:
    cluster, gateway = serving(2)
    route(cluster, gateway, *(entry(f"f{index}", exclude=(at(0),)) for index in range(WINDOW)))
    routed, _ = route(cluster, gateway, entry("stuck", exclude=(at(0),)), entry("free"))
    assert where(routed) == {"free": "m-0"}


def test_the_queue_is_bounded_for_new_ones_only() -> None:
    cluster, gateway = serving(0, limits=Limits(queued_requests_max=2))
    _, refused = route(cluster, gateway, entry("r1"), entry("r2"), entry("r3"), entry("r4", cause=RouteCause.LOST))
    assert list(refused) == ["r3"]
    assert refused["r3"].code is RouteCode.OVERLOADED
    assert refused["r3"].retry_ms > 0


def test_unknown_deployment_and_too_long_are_final() -> None:
    cluster, gateway = serving(1)
    _, refused = route(cluster, gateway, entry("r1", name="x"), entry("r2", prompt=CAPACITY.max_model_tokens))
    assert {one: refused[one].code for one in refused} == {
        "r1": RouteCode.UNKNOWN_DEPLOYMENT,
        "r2": RouteCode.TOO_LONG,
    }
    assert not any(one.retry_ms for one in refused.values())


def test_suspects_run_alone_and_twice_is_poison() -> None:
    cluster, gateway = serving(1)
    routed, refused = route(cluster, gateway, entry("r1", crashes=1), entry("r2", crashes=2), entry("r3"))
    assert {name: one.permit.solo for name, one in routed.items()} == {"r1": True, "r3": False}
    assert refused["r2"].code is RouteCode.POISON


def test_a_deadline_ends_the_wait() -> None:
    cluster, gateway = serving(0)
    route(cluster, gateway, entry("r1", remaining_ms=900), entry("r2"))
    assert answers(cluster.tick()) == ({}, {})
    _, refused = answers(cluster.tick())
    assert list(refused) == ["r1"]
    assert refused["r1"].code is RouteCode.DEADLINE
    assert RequestId("r1") not in cluster.state.requests


def test_without_hope_it_waits_for_a_node_only_so_long() -> None:
    cluster, gateway = serving(0)
    route(cluster, gateway, entry("r1"))
    ticks = round(cluster.timings.node_return / cluster.timings.heartbeat_interval)
    for _ in range(ticks - 1):
        assert answers(cluster.tick()) == ({}, {})
    _, refused = answers(cluster.tick())
    assert refused["r1"].code is RouteCode.NO_REPLICA
    assert refused["r1"].retry_ms == round(cluster.timings.failure_timeout * 1000)


def test_a_newer_attempt_takes_the_place_of_the_older() -> None:
    cluster, gateway = serving(1)
    route(cluster, gateway, entry("r1"))
    routed, _ = route(cluster, gateway, entry("r1", attempt=2, cause=RouteCause.LOST))
    assert routed["r1"].permit.attempt == 2
    assert cluster.state.replicas[ReplicaId("m-0")].load.outstanding == {"r1"}
    routed, refused = route(cluster, gateway, entry("r1"))
    assert routed == {}
    assert (refused["r1"].attempt, refused["r1"].code) == (1, RouteCode.STALE_ATTEMPT)
    assert refused["r1"].newest_attempt == 2, "who resumed it from an older copy asks above this"
    assert cluster.state.fenced["RouteEntry"] == 1


def test_a_lapsed_assignment_is_counted_no_more() -> None:
    cluster, gateway = serving(1)
    routed, _ = route(cluster, gateway, entry("r1"))
    worker = cluster.workers[next(iter(cluster.workers))]
    cluster.say(worker, AssignLapsed(permits=(routed["r1"].permit,)))
    assert cluster.state.replicas[ReplicaId("m-0")].load.sequences == 0


def test_an_unreachable_replica_gets_nothing() -> None:
    cluster, gateway = serving(2)
    w1 = next(iter(cluster.workers.values()))
    w1.stopped = True
    for _ in range(3):
        cluster.tick()
    routed, _ = route(cluster, gateway, *(entry(f"r{index}") for index in range(4)))
    assert set(where(routed).values()) == {"m-1"}


def test_only_the_model_that_a_request_was_made_for_goes_on_with_it() -> None:
    cluster, gateway = serving(2)
    routed, _ = route(cluster, gateway, *(entry(f"r{index}", model_path="/models/m") for index in range(4)))
    assert sorted(where(routed).values()) == ["m-0", "m-0", "m-1", "m-1"]
    change(cluster.state, DeploymentId("m"), deployment(replicas=2, path="/models/new"))
    cluster.tick()
    assert cluster.state.replicas[ReplicaId("m-0")].phase is ReplicaPhase.DRAINING
    # Too long for the old model proves nothing of the new one: it waits.
    again = entry("r0", attempt=2, model_path="/models/m")
    routed, refused = route(cluster, gateway, again, entry("new", prompt=9999, model_path="/models/new"))
    assert (where(routed), refused) == ({"r0": "m-1"}, {})
    over = [ended("r0", 2), *(ended(f"r{index}") for index in (1, 2, 3))]
    cluster.tell(gateway, EndBatch(entries=tuple(over)))
    cluster.settle()
    for _ in range(3):
        cluster.tick()
        cluster.settle()
    assert {one.spec and one.spec.model_path for one in cluster.state.replicas.values()} == {"/models/new"}
    _, refused = route(cluster, gateway, entry("late", model_path="/models/m"))
    assert refused["late"].code is RouteCode.DEPLOYMENT_FAILED
    assert refused["late"].reason.text == "m serves /models/new now, in place of /models/m"


def ended(request: str, attempt: int = 1) -> EndEntry:
    return EndEntry(request=RequestId(request), attempt=Attempt(attempt), outcome=Outcome.FINISHED, tokens=1)
