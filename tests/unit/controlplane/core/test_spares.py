"""Spares: when they are told to load, what they never stand in the way of, and from whom ranks may copy."""

from __future__ import annotations

from controlplane.core.messages import AdminAsked, ApplyAsked, AskId, Effect, LeaseHeard, LeaseMuted, SendWorker
from controlplane.core.views import status_view
from controlplane.core.weights import SOURCES_MAX, sources
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.messages.session import LoadReplica
from controlplane.runtime.messages.weights import PreloadWeights
from controlplane.runtime.records import DeploymentRecord
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import deployment

M = DeploymentId("m")


def cluster_of(record: DeploymentRecord, *devices: int) -> Cluster:
    """Workers w1, w2, … with so many devices each, and all that these let come up."""
    cluster = Cluster()
    cluster.deployments[M] = record
    cluster.load()
    for index, count in enumerate(devices):
        join(cluster, f"w{index + 1}", count)
    cluster.settle()
    return cluster


def join(cluster: Cluster, name: str, devices: int = 1) -> None:
    worker = cluster.add_worker(name, devices)
    cluster.register(worker)
    cluster.attach(worker)


def apply(cluster: Cluster, record: DeploymentRecord) -> list[Effect]:
    return cluster.step(AdminAsked(AskId(1), ApplyAsked(record))) + cluster.settle()


def preloads(effects: list[Effect]) -> list[str]:
    bodies = [effect.body for effect in effects if isinstance(effect, SendWorker)]
    return [f"{body.device}={body.rank}" for body in bodies if isinstance(body, PreloadWeights)]


def spares(cluster: Cluster) -> dict[str, int]:
    return {
        f"{node.node}/{device}": spare.rank
        for node in cluster.state.nodes.values()
        for device, spare in node.spares.items()
    }


def test_they_are_told_once_all_serve() -> None:
    cluster = Cluster()
    cluster.deployments[M] = deployment(spares=1)
    cluster.load()
    join(cluster, "w1")
    join(cluster, "w2")
    cluster.write_next()
    worker = cluster.workers[NodeId("w1")]
    for _ in range(3):
        assert spares(cluster) == {}
        cluster.answer_next(worker)
    cluster.settle()
    assert spares(cluster) == {"w2/cpu:0": 0}


def test_told_once_a_session() -> None:
    cluster = cluster_of(deployment(spares=1), 1, 1)
    assert preloads([effect for _ in range(20) for effect in cluster.tick()]) == []
    worker = cluster.workers[NodeId("w2")]
    cluster.break_stream(worker)
    assert preloads(cluster.attach(worker)) == ["cpu:0=0"]


def test_they_keep_no_replica_from_its_place() -> None:
    cluster = cluster_of(deployment(spares=2), 1, 2)
    assert len(spares(cluster)) == 2
    apply(cluster, deployment(replicas=2, spares=2))
    assert all(replica.phase is ReplicaPhase.READY for replica in cluster.state.replicas.values())
    assert len(spares(cluster)) == 1
    apply(cluster, deployment(replicas=3, spares=2))
    assert all(replica.phase is ReplicaPhase.READY for replica in cluster.state.replicas.values())
    assert spares(cluster) == {}


def test_another_model_takes_a_device_that_holds_nothing_first() -> None:
    cluster = cluster_of(deployment(spares=1), 1, 2)
    spare = next(iter(spares(cluster)))
    apply(cluster, deployment("n", path="/models/n"))
    member = cluster.state.replicas[ReplicaId("n-0")].members[0]
    assert f"{member.node}/{member.device}" != spare
    assert spares(cluster) == {spare: 0}


def test_each_deployment_has_its_own() -> None:
    cluster = cluster_of(deployment(spares=1), 1, 1, 2)
    apply(cluster, deployment("n", path="/models/n", spares=1))
    names = {spare.spec.deployment for node in cluster.state.nodes.values() for spare in node.spares.values()}
    assert names == {"m", "n"}


def test_another_model_under_the_name_is_loaded_anew() -> None:
    cluster = cluster_of(deployment(spares=1), 1, 1, 1)
    effects = apply(cluster, deployment(path="/models/new", spares=1))
    assert preloads(effects)
    specs = [spare.spec.model_path for node in cluster.state.nodes.values() for spare in node.spares.values()]
    assert specs == ["/models/new"]
    assert all(spare.ready for node in cluster.state.nodes.values() for spare in node.spares.values())


def test_none_while_frozen() -> None:
    cluster = cluster_of(deployment(), 1)
    cluster.step(LeaseMuted())
    cluster.state.deployments[M].record = deployment(spares=1)
    join(cluster, "w2")
    cluster.tick()
    assert spares(cluster) == {}
    cluster.step(LeaseHeard())
    cluster.settle()
    assert spares(cluster) == {"w2/cpu:0": 0}


def test_a_node_that_dies_takes_its_spares_along() -> None:
    cluster = cluster_of(deployment(spares=1), 1, 1)
    (place,) = spares(cluster)
    cluster.kill(cluster.workers[NodeId(place.partition("/")[0])])
    cluster.settle()
    assert spares(cluster) == {}


def test_a_shrunk_replica_has_no_use_for_spares() -> None:
    cluster = cluster_of(deployment(tensor=2, elastic=True, spares=1), 1, 1)
    cluster.kill(cluster.workers[NodeId("w2")])
    cluster.settle()
    for _ in range(20):
        cluster.tick()
        cluster.settle()
    join(cluster, "w3")
    cluster.settle()
    assert spares(cluster) == {}


def test_the_status_counts_those_that_are_ready() -> None:
    cluster = cluster_of(deployment(spares=2), 1, 1)
    (shown,) = status_view(cluster.state, cluster.now).deployments
    assert (shown.spares, shown.spares_ready) == (2, 1)


def test_loading_ranks_are_told_of_living_ones_elsewhere() -> None:
    cluster = cluster_of(deployment(replicas=2), 1)
    join(cluster, "w2")
    effects = cluster.settle()
    (load,) = [e.body for e in effects if isinstance(e, SendWorker) and isinstance(e.body, LoadReplica)]
    assert [source.address for source in load.sources] == ["w1/cpu:0"]


def test_a_lost_nodes_weights_are_gone_with_it() -> None:
    cluster = cluster_of(deployment(replicas=2), 1, 1)
    cluster.kill(cluster.workers[NodeId("w1")])
    cluster.settle()
    found = sources(cluster.state, M, frozenset())
    assert [source.address for source in found] == ["w2/cpu:0"]


def test_not_everybody_is_a_source() -> None:
    cluster = cluster_of(deployment(replicas=40), 20, 20)
    assert len(sources(cluster.state, M, frozenset())) == 40
    apply(cluster, deployment(replicas=80))
    join(cluster, "w3", 40)
    cluster.settle()
    found = sources(cluster.state, M, frozenset())
    assert len(found) == SOURCES_MAX
    assert len({sources(cluster.state, M, frozenset()) for _ in range(10)}) > 1
