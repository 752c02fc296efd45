"""elastic_scaling: who shrinks when, and how he grows back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.degrees import named
from controlplane.core.messages import AdminAsked, ApplyAsked, AskId, DrainAsked, UndrainAsked
from controlplane.core.views import status_view
from controlplane.runtime.ids import Epoch, NodeId, ReplicaId, RequestId
from controlplane.runtime.messages.common import RankPhase, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import RouteBatch
from controlplane.runtime.messages.session import GroupPhase, RankInfo, WorkerSnapshot
from tests.scenario.coordinator.peers import deployment, entry
from tests.unit.controlplane.core.elastic_cluster import cluster_of, die, join, replica_of, seconds, shape


def test_without_elastic_scaling_it_waits() -> None:
    cluster = cluster_of(1, 1, elastic=False)
    die(cluster, "w2")
    seconds(cluster, 60)
    assert shape(cluster) == {"m-0": "HELD"}


def test_a_daemon_that_restarts_at_once_is_awaited() -> None:
    cluster = cluster_of(1, 1)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage - cluster.timings.heartbeat_interval)
    assert shape(cluster) == {"m-0": "HELD"}
    join(cluster, "w2", 1)
    cluster.settle()
    assert shape(cluster) == {"m-0": "tp2"}


def test_a_first_place_is_awaited_longer() -> None:
    cluster = cluster_of(1)
    seconds(cluster, cluster.timings.node_return - cluster.timings.leader_grace - 1)
    assert shape(cluster) == {"m-0": "HELD"}
    seconds(cluster, 1)
    assert shape(cluster) == {"m-0": "tp1"}


def test_the_status_says_what_it_runs_with_and_why() -> None:
    cluster = cluster_of(1, 1)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    view = status_view(cluster.state, cluster.now)
    (shown,) = view.replicas
    assert named(shown.degrees) == "tp1"
    assert shown.reason is not None
    assert shown.reason.text == "shrunk from tp2 to tp1 until 2 devices are free"
    assert view.deployments[0].reason == "m-0: shrunk from tp2 to tp1 until 2 devices are free"


def test_one_full_replica_rather_than_two_shrunk_ones() -> None:
    cluster = cluster_of(2, 2, replicas=2, tensor=2)
    die(cluster, "w2")
    seconds(cluster, 60)
    assert shape(cluster) == {"m-0": "tp2", "m-1": "HELD"} or shape(cluster) == {"m-0": "HELD", "m-1": "tp2"}


def test_nobody_shrinks_onto_what_makes_another_whole() -> None:
    cluster = cluster_of(1, 1, replicas=3)
    assert shape(cluster) == {"m-0": "tp2", "m-1": "HELD", "m-2": "HELD"}
    die(cluster, "w2")
    seconds(cluster, 60)
    assert sorted(shape(cluster).values()) == ["HELD", "HELD", "tp1"]
    join(cluster, "w2", 1)
    for _ in range(200):
        cluster.tick()
        cluster.settle()
        assert list(shape(cluster).values()).count("tp1") <= 1
    assert sorted(shape(cluster).values()) == ["HELD", "HELD", "tp2"]


def test_what_makes_nobody_whole_is_used() -> None:
    cluster = cluster_of(1, 1, 1, replicas=2)
    seconds(cluster, 60)
    assert shape(cluster) == {"m-0": "tp2", "m-1": "tp1"}


def test_a_rank_that_restarts_finds_its_peer_free() -> None:
    cluster = cluster_of(2, replicas=2)
    seconds(cluster, 60)
    cluster.rank_exits(cluster.workers[NodeId("w1")], "cpu:0")
    cluster.settle()
    assert shape(cluster) == {"m-0": "tp2", "m-1": "HELD"}, "the other one did not shrink onto it meanwhile"


def test_a_node_whose_ranks_come_up_one_after_the_other_is_awaited() -> None:
    cluster = cluster_of(2)
    die(cluster, "w1")
    seconds(cluster, 60)
    worker = cluster.add_worker("w1", 2)
    starting = tuple(
        RankInfo(device=device, pid=200, phase=RankPhase.STARTING, replica=ReplicaId(""), epoch=Epoch(0), rank=0)
        for device in worker.devices
    )
    worker.down.extend(worker.devices)
    cluster.register(worker)
    cluster.hello(worker)
    cluster.say(worker, WorkerSnapshot(ranks=starting))
    cluster.settle()
    assert shape(cluster) == {"m-0": "tp2"}


def test_a_shrunk_replica_is_not_outdated() -> None:
    cluster = cluster_of(1, 1)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    epoch = replica_of(cluster).epoch
    seconds(cluster, 120)
    assert (shape(cluster), replica_of(cluster).epoch) == ({"m-0": "tp1"}, epoch)


def test_nor_to_the_next_leader() -> None:
    cluster = cluster_of(1, 1)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    epoch = replica_of(cluster).epoch
    heir = cluster.successor()
    heir.load()
    heir.attach(heir.workers[NodeId("w1")])
    seconds(heir, 60)
    assert (shape(heir), replica_of(heir).epoch) == ({"m-0": "tp1"}, epoch)


def test_another_model_replaces_a_shrunk_replica_too() -> None:
    cluster = cluster_of(1, 1)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    cluster.step(AdminAsked(AskId(1), ApplyAsked(deployment(tensor=2, path="/models/n", elastic=True))))
    cluster.settle()
    seconds(cluster, cluster.timings.stage)
    replica = replica_of(cluster)
    assert shape(cluster) == {"m-0": "tp1"}
    assert replica.spec is not None
    assert replica.spec.model_path == "/models/n"


def test_a_node_that_comes_and_goes_moves_nobody() -> None:
    cluster = cluster_of(1, 1)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    epoch = replica_of(cluster).epoch
    for _ in range(4):
        join(cluster, "w2", 1)
        seconds(cluster, cluster.timings.grow_after / 2)
        die(cluster, "w2")
        seconds(cluster, 2)
    assert (shape(cluster), replica_of(cluster).epoch) == ({"m-0": "tp1"}, epoch)


def test_it_grows_into_its_own_place() -> None:
    cluster = cluster_of(1, 1)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    join(cluster, "w2", 1)
    seconds(cluster, cluster.timings.grow_after + 1)
    assert shape(cluster) == {"m-0": "tp2"}


def test_two_grow_one_after_the_other() -> None:
    cluster = cluster_of(2, 2, 2, 2, replicas=2, tensor=4)
    die(cluster, "w2")
    die(cluster, "w4")
    seconds(cluster, 60)
    assert sorted(shape(cluster).values()) == ["HELD", "tp4"], "one is full"
    die(cluster, "w1")
    seconds(cluster, 60)
    for name in ("w1", "w2", "w4"):
        join(cluster, name, 2)
    seconds(cluster, 5 * cluster.timings.grow_after)
    assert list(shape(cluster).values()) == ["tp4", "tp4"]


def test_who_grows_beside_serves_all_along() -> None:
    cluster = cluster_of(1, 1)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    join(cluster, "w3", 2)
    for _ in range(200):
        cluster.tick()
        assert any(replica.phase is ReplicaPhase.READY for replica in cluster.state.replicas.values())
        cluster.settle()
        assert any(replica.phase is ReplicaPhase.READY for replica in cluster.state.replicas.values())
    assert shape(cluster) == {"m-1": "tp2"}, "it stays where it serves"


def test_a_stand_in_that_lost_its_place_takes_nobody_elses() -> None:
    cluster = cluster_of(1, 1)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    join(cluster, "w3", 2)
    while ReplicaId("m-1") not in cluster.state.replicas:
        cluster.tick()
    die(cluster, "w3")
    seconds(cluster, 60)
    assert shape(cluster) == {"m-0": "tp1"}


def test_out_of_memory_once_for_each_size() -> None:
    cluster = cluster_of(2, 2, tensor=4)
    worker = cluster.workers[NodeId("w1")]
    die(cluster, "w2")
    for _ in range(7):
        cluster.tick()
    while cluster.writes:
        cluster.write_next()
    while replica_of(cluster).phase is not ReplicaPhase.LOADING:
        cluster.answer_next(worker)
    cluster.group(worker, ReplicaId("m-0"), GroupPhase.LOADED, ReasonKind.OUT_OF_MEMORY)
    epoch = replica_of(cluster).epoch
    seconds(cluster, 60)
    assert (shape(cluster), replica_of(cluster).epoch) == ({"m-0": "HELD"}, epoch)
    cluster.step(AdminAsked(AskId(1), ApplyAsked(deployment(tensor=4, elastic=True))))
    cluster.settle()
    assert shape(cluster) == {"m-0": "tp2"}, "an operator's word: try again"


def test_a_drained_node_is_no_reason_to_stay_shrunk() -> None:
    cluster = cluster_of(1, 1)
    cluster.step(AdminAsked(AskId(1), DrainAsked(NodeId("w2"), 1000)))
    seconds(cluster, cluster.timings.stage + 2)
    assert shape(cluster) == {"m-0": "tp1"}
    cluster.step(AdminAsked(AskId(2), UndrainAsked(NodeId("w2"))))
    seconds(cluster, cluster.timings.grow_after + 1)
    assert shape(cluster) == {"m-0": "tp2"}


@pytest.mark.parametrize("elastic", [True, False])
def test_what_only_the_full_size_has_room_for_waits(elastic: bool) -> None:
    cluster = cluster_of(1, 1, elastic=elastic)
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("long", prompt=100_000),)))
    waits = RequestId("long") in cluster.state.requests
    assert waits == elastic


def test_a_model_that_nobody_serves_comes_first() -> None:
    cluster = cluster_of(2, 2, replicas=2, tensor=2)
    other = replace(deployment("n", tensor=2, elastic=True), model="n")
    cluster.step(AdminAsked(AskId(1), ApplyAsked(other)))
    cluster.settle()
    assert shape(cluster)["n-0"] == "HELD"
    die(cluster, "w2")
    join(cluster, "w3", 2)
    cluster.settle()
    assert shape(cluster)["n-0"] == "tp2"
