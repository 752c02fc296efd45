"""elastic_scaling: who shrinks when, and how he grows back."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from controlplane.core.degrees import named
from controlplane.core.entities import Replica
from controlplane.core.messages import AdminAsked, ApplyAsked, AskId, DrainAsked, ScaleAsked, UndrainAsked
from controlplane.core.views import status_view
from controlplane.runtime.ids import DeploymentId, Epoch, NodeId, ReplicaId, RequestId
from controlplane.runtime.messages.common import RankPhase, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import RouteBatch
from controlplane.runtime.messages.session import GroupPhase, RankInfo, WorkerSnapshot
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import deployment, entry

M = DeploymentId("m")


def cluster_of(*devices: int, replicas: int = 1, tensor: int = 2, pipeline: int = 1, elastic: bool = True) -> Cluster:
    """Workers w1, w2, … with so many devices each, and all that these let come up."""
    cluster = Cluster()
    cluster.deployments[M] = deployment(replicas=replicas, tensor=tensor, pipeline=pipeline, elastic=elastic)
    cluster.load()
    for index, count in enumerate(devices):
        join(cluster, f"w{index + 1}", count)
    cluster.settle()
    seconds(cluster, cluster.timings.leader_grace)
    return cluster


def join(cluster: Cluster, name: str, devices: int) -> None:
    worker = cluster.add_worker(name, devices)
    cluster.register(worker)
    cluster.attach(worker)


def die(cluster: Cluster, name: str) -> None:
    cluster.kill(cluster.workers[NodeId(name)])
    cluster.settle()


def seconds(cluster: Cluster, count: float) -> None:
    """Time passes; everybody answers."""
    for _ in range(round(count / cluster.timings.heartbeat_interval)):
        cluster.tick()
        cluster.settle()


def replica_of(cluster: Cluster, name: str = "m-0") -> Replica:
    return cluster.state.replicas[ReplicaId(name)]


def shape(cluster: Cluster) -> dict[str, str]:
    """Degrees of those that serve; phases of the others."""
    return {
        name: named(replica.spec.degrees)
        if replica.phase is ReplicaPhase.READY and replica.spec
        else replica.phase.name
        for name, replica in cluster.state.replicas.items()
    }


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


def gathering(tensor: int = 1, pipeline: int = 4, replicas: int = 3) -> Cluster:
    """Two replicas shrunk to two and one of four ranks, and a free device."""
    cluster = cluster_of(1, 1, 1, 1, replicas=replicas, tensor=tensor, pipeline=pipeline)
    die(cluster, "w3")
    die(cluster, "w4")
    seconds(cluster, 60)
    join(cluster, "w5", 1)
    seconds(cluster, cluster.timings.stage)
    assert sorted(ranks(cluster)) == [1, 2]
    join(cluster, "w6", 1)
    return cluster


def ranks(cluster: Cluster) -> list[int]:
    """Of each replica that serves."""
    serving = [replica for replica in cluster.state.replicas.values() if replica.phase is ReplicaPhase.READY]
    return [len(replica.members) for replica in serving]


def test_parts_and_what_is_free_make_one_whole() -> None:
    cluster = gathering()
    while len(ranks(cluster)) == 2:
        cluster.tick()
    assert shape(cluster)["m-0"] == "PLANNED", "both end at once, and one has its place in the same step"
    assert cluster.now - cluster.state.nodes[NodeId("w6")].joined_at >= cluster.timings.grow_after
    cluster.settle()
    assert shape(cluster) == {"m-0": "pp4", "m-1": "HELD", "m-2": "HELD"}
    epoch = replica_of(cluster).epoch
    seconds(cluster, 300)
    assert (ranks(cluster), replica_of(cluster).epoch) == ([4], epoch)


@pytest.mark.parametrize(("devices", "left"), [(1, 1), (2, 2)])
def test_who_is_not_needed_serves_on(devices: int, left: int) -> None:
    """With two more devices the larger one grows alone, with three the smaller one, which needs all three."""
    cluster = gathering()
    stays = next(one for one in cluster.state.replicas.values() if len(one.members) == left)
    epoch = stays.epoch
    join(cluster, "w7", devices)
    seconds(cluster, 2 * cluster.timings.grow_after)
    assert sorted(ranks(cluster)) == [left, 4]
    assert (len(stays.members), stays.epoch) == (left, epoch)


def test_no_tensor_group_is_cut_to_gather_parts() -> None:
    cluster = gathering(tensor=4, pipeline=1)
    seconds(cluster, 120)
    assert sorted(ranks(cluster)) == [1, 1, 2], "what is free is used"


def test_nobody_gathers_for_whom_a_stranger_waits() -> None:
    cluster = gathering()
    other = replace(deployment("n", tensor=8), model="n")
    cluster.step(AdminAsked(AskId(1), ApplyAsked(other)))
    cluster.settle()
    seconds(cluster, 120)
    assert sorted(ranks(cluster)) == [1, 1, 2]
    cluster.step(AdminAsked(AskId(2), ScaleAsked(DeploymentId("n"), 0)))
    cluster.settle()
    seconds(cluster, cluster.timings.grow_after)
    assert sorted(ranks(cluster)) == [4]


def test_one_device_ends_one_replica() -> None:
    """Both could grow by it: the other one, of another model, serves on."""
    cluster = cluster_of(1, 1)
    cluster.step(AdminAsked(AskId(1), ApplyAsked(replace(deployment("n", tensor=2, elastic=True), model="n"))))
    join(cluster, "w3", 1)
    join(cluster, "w4", 1)
    cluster.settle()
    die(cluster, "w2")
    seconds(cluster, cluster.timings.stage)
    die(cluster, "w4")
    seconds(cluster, 2 * cluster.timings.stage)
    assert shape(cluster) == {"m-0": "tp1", "n-0": "tp1"}
    epoch = replica_of(cluster, "n-0").epoch
    join(cluster, "w5", 1)
    seconds(cluster, 2 * cluster.timings.grow_after)
    assert (shape(cluster), replica_of(cluster, "n-0").epoch) == ({"m-0": "tp2", "n-0": "tp1"}, epoch)


@pytest.mark.parametrize("seed", range(8))
def test_in_the_end_as_many_are_whole_as_can_be_and_nobody_moves(seed: int) -> None:
    random = Random(seed)
    cluster = cluster_of(1, 1, 1, replicas=4, tensor=1, pipeline=3)
    there = ["w1", "w2", "w3"]
    for index in range(4, 20):
        if random.random() < 0.4 and there:
            die(cluster, there.pop(random.randrange(len(there))))
        else:
            there.append(f"w{index}")
            join(cluster, there[-1], 1)
        seconds(cluster, random.choice((0, 1, 4, 10, 40, 70)))
    seconds(cluster, 5 * cluster.timings.grow_after)
    assert ranks(cluster).count(3) == min(4, len(there) // 3)
    assert sum(ranks(cluster)) == min(12, len(there))
    epochs = [replica.epoch for replica in cluster.state.replicas.values()]
    seconds(cluster, 5 * cluster.timings.grow_after)
    assert [replica.epoch for replica in cluster.state.replicas.values()] == epochs


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
