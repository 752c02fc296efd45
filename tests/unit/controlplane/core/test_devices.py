"""What is free, and whether that is known: the leader's short ways agree with looking at every node."""

from __future__ import annotations

from random import Random

import pytest

from controlplane.core.devices import free_nodes, may_place
from controlplane.core.entities import LeaderPhase, NodePhase
from controlplane.core.messages import AdminAsked, AskId, ScaleAsked
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import DeploymentId, NodeId
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import deployment, snapshot_of

M = DeploymentId("m")
DEVICES = 2


def free_devices(state: ClusterState) -> dict[NodeId, list[str]]:
    """Looking at everything."""
    taken = {
        (member.node, member.device)
        for replica in state.replicas.values()
        if replica.holds_devices
        for member in replica.members
    }
    free = {
        node.node: [device.id for device in node.devices if (node.node, device.id) not in taken]
        for node in state.nodes.values()
        if node.placeable
    }
    return {name: devices for name, devices in free.items() if devices}


def told_all(state: ClusterState) -> bool:
    """Looking at everything."""
    return not any(
        node.phase is NodePhase.KNOWN or (node.link is not None and not node.known) for node in state.nodes.values()
    )


def agree(state: ClusterState) -> None:
    found = {one.node: [device.device for device in one.free] for one in free_nodes(state)}
    assert {name: devices for name, devices in found.items() if devices} == free_devices(state)
    if state.phase is LeaderPhase.REBUILDING:
        assert may_place(state) == told_all(state)


def change(cluster: Cluster, random: Random) -> None:
    """Something happens to a node, or is wanted."""
    worker = random.choice(list(cluster.workers.values()))
    attached = cluster.state.nodes.get(worker.node) is not None and cluster.state.nodes[worker.node].link is not None
    match random.choice(("register", "hello", "snapshot", "break", "kill", "scale", "settle", "tick")):
        case "register" if not attached:
            cluster.register(worker)
        case "hello" if not attached:
            cluster.hello(worker)
        case "snapshot" if attached and not cluster.state.nodes[worker.node].known:
            cluster.say(worker, snapshot_of(worker))
        case "break" if attached:
            cluster.break_stream(worker)
        case "kill" if attached:
            cluster.kill(worker)
            cluster.add_worker(worker.node, DEVICES)
        case "scale":
            cluster.step(AdminAsked(AskId(1), ScaleAsked(M, random.randrange(9))))
        case "settle":
            cluster.settle()
        case "tick":
            cluster.tick()
        case _:
            pass


@pytest.mark.parametrize("seed", range(20))
def test_the_short_ways_agree_with_looking_at_everything(seed: int) -> None:
    random, cluster = Random(seed), Cluster()
    cluster.deployments[M] = deployment(replicas=5)
    workers = [cluster.add_worker(f"w{number}", DEVICES) for number in range(4)]
    cluster.load()
    cluster.register(workers[0])
    for _ in range(60):
        change(cluster, random)
        agree(cluster.state)


def test_a_full_node_is_listed_if_it_is_asked_for() -> None:
    cluster = Cluster()
    cluster.deployments[M] = deployment(replicas=1)
    cluster.load()
    for name in ("w1", "w2"):
        worker = cluster.add_worker(name)
        cluster.register(worker)
        cluster.attach(worker)
    cluster.settle()
    (full,) = cluster.state.replicas.values()
    (free,) = free_nodes(cluster.state)
    both = free_nodes(cluster.state, also=full.nodes)
    assert {one.node: len(one.free) for one in both} == {free.node: 1, full.nodes[0]: 0}
