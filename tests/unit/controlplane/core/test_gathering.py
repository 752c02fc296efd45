"""elastic_scaling: shrunk replicas that make a whole one together."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from controlplane.core.messages import AdminAsked, ApplyAsked, AskId, ScaleAsked
from controlplane.runtime.ids import DeploymentId, NodeId
from controlplane.runtime.messages.common import ReplicaPhase
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import deployment
from tests.unit.controlplane.core.elastic_cluster import cluster_of, die, join, replica_of, seconds, shape


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
