"""Gateways' sessions: table, inventory, locate, cancel."""

from __future__ import annotations

from dataclasses import replace

from controlplane.core.desired import change
from controlplane.core.gateways import row_of
from controlplane.core.messages import AdminAnswered, AdminAsked, AskId, CancelAsked, Effect, LeaseMuted, SendGateway
from controlplane.runtime.ids import Attempt, DeploymentId, Epoch, Incarnation, NodeId, ReplicaId, RequestId
from controlplane.runtime.messages.common import ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import (
    CancelRequest,
    GatewayWelcome,
    Inventory,
    JournalInfo,
    JournalPhase,
    LeaderHeartbeat,
    Locate,
    Located,
    ReplicaClosed,
    ReplicaTable,
    RouteBatch,
    RoutedBatch,
)
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import GatewayPeer, deployment, entry

M0 = ReplicaId("m-0")
TICKS_OF_GRACE = 8


def serving() -> Cluster:
    cluster = Cluster()
    cluster.deployments[DeploymentId("m")] = deployment()
    cluster.load()
    worker = cluster.add_worker("w1")
    cluster.register(worker)
    cluster.attach(worker)
    cluster.settle()
    return cluster


def bodies(effects: list[Effect]) -> list[object]:
    return [effect.body for effect in effects if isinstance(effect, SendGateway)]


def journal(request: str, epoch: int = 1, phase: JournalPhase = JournalPhase.RUNNING, attempt: int = 1) -> JournalInfo:
    return JournalInfo(phase=phase, replica=M0, epoch=Epoch(epoch), entry=entry(request, attempt=attempt))


def join(cluster: Cluster, *journals: JournalInfo) -> tuple[GatewayPeer, list[object]]:
    effects: list[Effect] = []
    return cluster.add_gateway("g1", journals, effects), bodies(effects)


def test_welcome_then_the_full_table() -> None:
    _, (welcome, table) = join(serving())
    assert isinstance(welcome, GatewayWelcome)
    assert isinstance(table, ReplicaTable)
    assert table.full
    (row,) = table.rows
    assert (row.replica, row.phase, row.node, row.serve_address) == (M0, ReplicaPhase.READY, "w1", "w1:7000")
    assert (row.model, row.model_path, row.numerics) == ("m", "/models/m", "auto")
    assert row.capacity is not None


def test_running_journals_are_counted_on_their_replica() -> None:
    cluster = serving()
    join(cluster, journal("r1"), journal("r2", phase=JournalPhase.DRAINING_CLIENT))
    assert cluster.state.replicas[M0].load.outstanding == {"r1"}
    assert set(cluster.state.requests) == {"r1", "r2"}


def test_a_journal_on_an_epoch_that_is_over_is_told_so() -> None:
    cluster = serving()
    cluster.rank_exits(cluster.workers[next(iter(cluster.workers))], "cpu:0")
    _, said = join(cluster, journal("r1"))
    (closed,) = [body for body in said if isinstance(body, ReplicaClosed)]
    assert (closed.replica, closed.epoch) == (M0, 1)
    assert RequestId("r1") not in cluster.state.requests


def test_a_journal_that_asks_is_routed() -> None:
    _, said = join(serving(), journal("r1", phase=JournalPhase.ROUTING, attempt=3))
    (batch,) = [body for body in said if isinstance(body, RoutedBatch)]
    assert batch.routed[0].permit.attempt == 3


def test_what_an_inventory_leaves_out_is_over() -> None:
    cluster = serving()
    gateway, _ = join(cluster, journal("r1"), journal("r2"))
    cluster.close_gateway(gateway)
    assert cluster.state.replicas[M0].load.outstanding == {"r1", "r2"}
    cluster.open_gateway(gateway, (journal("r2"),))
    assert cluster.state.replicas[M0].load.outstanding == {"r2"}


def test_an_inventory_in_chunks_counts_with_its_last() -> None:
    cluster = serving()
    gateway, _ = join(cluster, journal("r1"))
    cluster.close_gateway(gateway)
    cluster.open_gateway(gateway, (journal("r2"),), last=False)
    assert set(cluster.state.requests) == {"r1", "r2"}
    cluster.tell(gateway, Inventory(journals=(journal("r3"),), last=True))
    assert set(cluster.state.requests) == {"r2", "r3"}


def test_what_waited_goes_with_the_session() -> None:
    cluster = Cluster()
    cluster.deployments[DeploymentId("m")] = deployment()
    cluster.load()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    cluster.close_gateway(gateway)
    assert not cluster.state.requests


def test_orphans_are_kept_for_the_resume_grace() -> None:
    cluster = serving()
    gateway, _ = join(cluster, journal("r1"))
    cluster.close_gateway(gateway)
    ticks = round(cluster.timings.resume_grace / cluster.timings.heartbeat_interval)
    for _ in range(ticks - 1):
        cluster.tick()
    assert set(cluster.state.requests) == {"r1"}
    cluster.tick()
    assert not cluster.state.requests
    assert not cluster.state.gateways


def test_orphans_are_no_longer_counted_once_their_gateway_is_back() -> None:
    cluster = serving()
    gateway, _ = join(cluster, journal("r1"), journal("r2"))
    cluster.close_gateway(gateway)
    cluster.tick()
    assert cluster.state.orphans == {"r1": 0.5, "r2": 0.5}
    cluster.open_gateway(gateway, (journal("r1"),))
    cluster.tick()
    assert set(cluster.state.requests) == {"r1"}
    assert not cluster.state.orphans


def test_a_gateway_that_is_replaced_leaves_orphans() -> None:
    """Another process of its name holds none of its journals."""
    cluster = serving()
    gateway, _ = join(cluster, journal("r1"))
    gateway.incarnation = Incarnation("another")
    cluster.open_gateway(gateway)
    assert set(cluster.state.orphans) == {"r1"}


def test_heartbeats_go_down_each_tick() -> None:
    cluster = serving()
    join(cluster)
    assert bodies(cluster.tick()) == [LeaderHeartbeat()]
    cluster.step(LeaseMuted())
    assert bodies(cluster.tick()) == [LeaderHeartbeat(frozen=True)]


def test_a_new_leader_may_not_have_heard_of_all_while_streams_are_kept() -> None:
    cluster = serving().successor()
    cluster.load()
    join(cluster)
    ticks = round(cluster.timings.resume_grace / cluster.timings.heartbeat_interval)
    for _ in range(ticks - 1):
        assert LeaderHeartbeat(workers_unheard=True) in bodies(cluster.tick())
    assert LeaderHeartbeat() in bodies(cluster.tick())


def test_a_node_without_a_lease_may_come_back_while_streams_are_kept() -> None:
    """Gateways hear so before they hear that it is gone."""
    cluster = serving()
    join(cluster)
    for _ in range(TICKS_OF_GRACE):
        cluster.tick()
    cluster.break_stream(cluster.workers[NodeId("w1")])
    heartbeat, *_, table = bodies(cluster.lease_gone(NodeId("w1")))
    assert heartbeat == LeaderHeartbeat(workers_unheard=True)
    assert isinstance(table, ReplicaTable)
    assert [worker.gone for worker in table.workers] == [True]


def test_a_node_that_is_proven_dead_is_not_waited_for() -> None:
    cluster = serving()
    join(cluster)
    cluster.kill(cluster.workers[NodeId("w1")])
    effects = cluster.probe_next() + cluster.revoke_next()
    assert any(isinstance(body, ReplicaTable) and body.workers for body in bodies(effects))
    assert LeaderHeartbeat() in bodies(cluster.tick())


def test_locate_names_the_node_or_nothing() -> None:
    cluster = serving()
    gateway, _ = join(cluster, journal("r1"))
    (known,) = bodies(cluster.tell(gateway, Locate(request=RequestId("r1"))))
    (unknown,) = bodies(cluster.tell(gateway, Locate(request=RequestId("r9"))))
    assert isinstance(known, Located)
    assert isinstance(unknown, Located)
    assert (known.node, known.serve_address) == ("w1", "w1:7000")
    assert (unknown.node, unknown.serve_address) == ("", "")


def test_cancel_goes_to_the_requests_gateway() -> None:
    cluster = serving()
    join(cluster, journal("r1"))
    effects = cluster.step(AdminAsked(AskId(1), CancelAsked(RequestId("r1"))))
    (cancel,) = bodies(effects)
    assert isinstance(cancel, CancelRequest)
    assert AdminAnswered(AskId(1), None) in effects
    (answer,) = cluster.step(AdminAsked(AskId(2), CancelAsked(RequestId("r9"))))
    assert isinstance(answer, AdminAnswered)
    assert answer.error is not None
    assert answer.error.kind is ReasonKind.UNKNOWN_ID


def test_an_inventory_does_not_undo_a_newer_attempt() -> None:
    cluster = serving()
    gateway, _ = join(cluster)
    cluster.tell(gateway, RouteBatch(entries=(entry("r1", attempt=2),)))
    cluster.close_gateway(gateway)
    cluster.open_gateway(gateway, (journal("r1", attempt=1),))
    assert cluster.state.requests[RequestId("r1")].entry.attempt == Attempt(2)


def test_a_journal_taken_over_is_counted_for_its_new_gateway() -> None:
    cluster = serving()
    cluster.add_gateway("g0", (journal("r1"),))
    new, _ = join(cluster)
    cluster.tell(new, Inventory(journals=(journal("r1", attempt=2),), last=False))
    request = cluster.state.requests[RequestId("r1")]
    assert (request.gateway, request.entry.attempt) == ("g1", 2)
    assert cluster.state.replicas[M0].load.outstanding == {"r1"}
    cluster.tell(new, Inventory())
    assert cluster.state.fenced["Inventory"] == 1, "a second whole inventory is none"
    assert RequestId("r1") in cluster.state.requests


def test_replicas_keep_the_name_of_the_model_that_they_run() -> None:
    """Clients that ask for the new name are not answered by the old model, nor held to its limits."""
    cluster = serving()
    join(cluster)
    state = cluster.state
    for name, path in (("n", "/models/n"), ("o", "/models/o")):
        change(state, DeploymentId("m"), replace(deployment(path=path), model=name))
        row = row_of(state, state.replicas[M0])
        assert (row.model, row.model_path, row.outdated) == ("m", "/models/m", True)
        assert row.capacity is not None
    cluster.tick()
    cluster.settle()
    row = row_of(state, state.replicas[M0])
    assert (row.model, row.model_path, row.outdated) == ("o", "/models/o", False)
    change(state, DeploymentId("m"), replace(deployment(path="/models/o"), model="p"))
    assert row_of(state, state.replicas[M0]).model == "p"
    assert not state.deployments[DeploymentId("m")].names
