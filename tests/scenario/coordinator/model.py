"""A tiny cluster around the coordinator's core: etcd as two dicts, workers and gateways as a few lines each.

Nothing happens by itself: whoever drives the model (a text scenario, a random machine, a unit test) says which worker
answers next, whether a write succeeds, and when time passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from controlplane.core.messages import (
    CloseConnection,
    ConnectionId,
    DeleteDeployment,
    DeletePlacement,
    Effect,
    Event,
    GatewayClosed,
    GatewayOpened,
    GatewaySaid,
    NodeKeyChanged,
    Probe,
    ProbeDone,
    RevokeDone,
    RevokeLease,
    SendGateway,
    SendWorker,
    StoreLoaded,
    Tick,
    WorkerClosed,
    WorkerOpened,
    WorkerSaid,
    WriteDeployment,
    WriteDone,
    WritePlacement,
)
from controlplane.core.state import ClusterState, Limits
from controlplane.core.step import step
from controlplane.runtime.ids import DeploymentId, GatewayId, Incarnation, NodeId, ReplicaId, Term
from controlplane.runtime.messages.common import Head, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import (
    EndBatch,
    GatewayHeartbeat,
    GatewayWelcome,
    Inventory,
    JournalInfo,
    RouteUp,
)
from controlplane.runtime.messages.session import (
    AbortGroup,
    AssignBatch,
    AttachUp,
    Drained,
    DrainNode,
    FormGroup,
    GroupPhase,
    LoadReplica,
    PrepareGroup,
    ReleaseReplica,
    UndrainNode,
)
from controlplane.runtime.messages.weights import PreloadWeights
from controlplane.runtime.records import DeploymentRecord, NodeRecord, PlacementRecord
from controlplane.runtime.timing import Timings
from tests.scenario.coordinator.peers import (
    CLUSTER,
    TIMINGS,
    GatewayPeer,
    Held,
    Worker,
    gateway_hello_of,
    group_state_of,
    heartbeat_of,
    hello_of,
    idle_rank,
    lose_rank,
    preload,
    snapshot_of,
    weights_of,
    weights_state_of,
)
from tools.sim.duties import Duties


class Cluster:
    """The core under test, its peers, and everything it asked for."""

    def __init__(self, *, term: int = 1, limits: Limits | None = None, timings: Timings = TIMINGS) -> None:
        self.timings = timings
        self.now = 1000.0
        self.state = ClusterState.new(
            term=Term(term),
            name="cp1",
            incarnation=Incarnation("1" * 32),
            cluster=CLUSTER,
            timings=timings,
            limits=limits or Limits(),
            rng_seed=7,
        )
        self.duties = Duties(Term(term))
        # Sees every effect after the model took it.
        self.watch: Callable[[Effect], None] = lambda effect: None
        self.workers: dict[NodeId, Worker] = {}
        self.gateways: dict[GatewayId, GatewayPeer] = {}
        self.keys: dict[NodeId, NodeRecord] = {}
        self.placements: dict[ReplicaId, PlacementRecord] = {}
        self.deployments: dict[DeploymentId, DeploymentRecord] = {}
        self.writes: deque[WritePlacement | DeletePlacement | WriteDeployment | DeleteDeployment] = deque()
        self.probes: deque[Probe] = deque()
        self.revokes: deque[RevokeLease] = deque()
        self.etcd_up = True
        self.connections = 0
        self.leases = 0

    # ------------------------------------------------------------ the core

    def step(self, event: Event) -> list[Effect]:
        was_frozen = self.state.frozen
        self.duties.before(event)
        effects = step(self.state, event, self.now)
        self.state.check()
        self.duties.after(event, effects, frozen=was_frozen and self.state.frozen)
        for effect in effects:
            self._take(effect)
            self.watch(effect)
        return effects

    def _take(self, effect: Effect) -> None:
        match effect:
            case SendWorker():
                for worker in [one for one in self.workers.values() if one.connection == effect.connection]:
                    worker.take(effect.body)
            case SendGateway():
                for gateway in self.gateways.values():
                    if gateway.connection == effect.connection and isinstance(effect.body, GatewayWelcome):
                        gateway.session = effect.body.session
            case CloseConnection():
                self._closed_from_above(effect.connection)
            case WritePlacement() | DeletePlacement() | WriteDeployment() | DeleteDeployment():
                self.writes.append(effect)
            case Probe():
                self.probes.append(effect)
            case RevokeLease():
                self.revokes.append(effect)

    def successor(self) -> Cluster:
        """Another control plane, just elected: the same etcd, the same peers without a session."""
        other = Cluster(term=self.state.term + 1, limits=self.state.limits, timings=self.timings)
        other.now, other.leases, other.watch, other.etcd_up = self.now, self.leases, self.watch, True
        other.keys, other.placements, other.deployments = self.keys, self.placements, self.deployments
        for worker in self.workers.values():
            worker.disconnect()
        for peer in self.gateways.values():
            peer.connection = None
        other.workers, other.gateways = self.workers, self.gateways
        return other

    def _closed_from_above(self, connection: ConnectionId) -> None:
        for worker in [one for one in self.workers.values() if one.connection == connection]:
            worker.disconnect()
        for peer in [one for one in self.gateways.values() if one.connection == connection]:
            peer.connection = None

    # ------------------------------------------------------------ etcd

    def load(self, *, restored: bool = False, peers: tuple[str, ...] = ()) -> list[Effect]:
        return self.step(
            StoreLoaded(dict(self.keys), dict(self.deployments), dict(self.placements), frozenset(peers), restored)
        )

    def write_next(self) -> list[Effect]:
        """etcd answers the oldest write."""
        write = self.writes.popleft()
        if not self.etcd_up:
            return self.step(WriteDone(write.write, False, Reason(kind=ReasonKind.STORE_UNAVAILABLE)))
        match write:
            case WritePlacement():
                self.placements[write.record.replica] = write.record
            case DeletePlacement():
                self.placements.pop(write.replica, None)
            case WriteDeployment():
                self.deployments[write.record.deployment] = write.record
            case DeleteDeployment():
                self.deployments.pop(write.deployment, None)
        return self.step(WriteDone(write.write, True))

    def revoke_next(self) -> list[Effect]:
        revoke = self.revokes.popleft()
        if not self.etcd_up:
            return self.step(RevokeDone(revoke.node, revoke.incarnation, False))
        effects = self.step(RevokeDone(revoke.node, revoke.incarnation, True))
        key = self.keys.get(revoke.node)
        if key is not None and key.lease_id == revoke.lease_id:
            effects += self.lease_gone(revoke.node)
        return effects

    def probe_next(self) -> list[Effect]:
        probe = self.probes.popleft()
        worker = self.workers.get(probe.node)
        refused = worker is None or not worker.alive or worker.refuses or worker.incarnation != probe.incarnation
        return self.step(ProbeDone(probe.node, probe.incarnation, refused))

    def lease_gone(self, node: NodeId) -> list[Effect]:
        self.keys.pop(node, None)
        return self.step(NodeKeyChanged(node, None))

    def register(self, worker: Worker) -> list[Effect]:
        """The worker puts its key under a fresh lease."""
        self.leases += 1
        worker.lease = self.leases
        self.keys[worker.node] = worker.record()
        return self.step(NodeKeyChanged(worker.node, worker.record()))

    # ------------------------------------------------------------ workers

    def add_worker(self, name: str, devices: int = 1) -> Worker:
        """A fresh process under `name`, not yet connected."""
        node = NodeId(name)
        self.leases += 1
        names = tuple(f"cpu:{index}" for index in range(devices))
        worker = Worker(node, Incarnation(f"{name}-{self.leases}"), self.leases, names)
        self.workers[node] = worker
        return worker

    def attach(self, worker: Worker) -> list[Effect]:
        """Open a session and send the whole Snapshot."""
        effects = self.hello(worker)
        return effects + self.say(worker, snapshot_of(worker)) if worker.session else effects

    def hello(self, worker: Worker, **fields: object) -> list[Effect]:
        self.connections += 1
        worker.disconnect()
        worker.connection, worker.sent, worker.received = ConnectionId(self.connections), 0, 0
        return self.step(WorkerOpened(worker.connection, hello_of(worker, **fields)))

    def say(self, worker: Worker, body: AttachUp) -> list[Effect]:
        assert worker.connection is not None
        worker.sent += 1
        head = Head(term=self.state.term, session=worker.session, seq=worker.sent, ack=worker.received)
        return self.step(WorkerSaid(worker.connection, head, body))

    def beat(self, worker: Worker) -> list[Effect]:
        return self.say(worker, heartbeat_of(worker, self.now))

    def answer_next(self, worker: Worker) -> list[Effect]:
        """The worker handles its oldest frame."""
        frame = worker.inbox.popleft()
        worker.received += 1
        match frame:
            case PrepareGroup():
                devices = {m.device: m.rank for m in frame.members if m.node == worker.node}
                holders = [name for name, held in worker.held.items() if held.devices.keys() & devices.keys()]
                assert set(holders) <= {frame.replica}, f"{frame.replica} prepares on devices of {holders}"
                worker.held[frame.replica] = Held(frame.epoch, ReplicaPhase.PREPARING, devices, frame.spec)
                return self.group(worker, frame.replica, GroupPhase.PREPARED)
            case FormGroup():
                return self._advance(worker, frame, ReplicaPhase.FORMING, GroupPhase.FORMED)
            case LoadReplica():
                return self._advance(worker, frame, ReplicaPhase.READY, GroupPhase.LOADED)
            case AbortGroup() | ReleaseReplica():
                held = worker.held.get(frame.replica)
                if held is not None and held.epoch <= frame.epoch:
                    del worker.held[frame.replica]
                    worker.end_sequences(frame.replica)
                    return self._ranks_exit(worker, held) if isinstance(frame, ReleaseReplica) else []
            case PreloadWeights():
                return self.say(worker, preload(worker, frame))
            case AssignBatch():
                worker.assigned.update({permit.request: permit for permit in frame.permits})
            case DrainNode():
                worker.draining = True
                return self.say(worker, Drained()) if not worker.assigned else []
            case UndrainNode():
                worker.draining = False
        return []

    def _advance(
        self, worker: Worker, frame: FormGroup | LoadReplica, phase: ReplicaPhase, answer: GroupPhase
    ) -> list[Effect]:
        held = worker.held.get(frame.replica)
        if held is None or held.epoch != frame.epoch:
            return []
        held.phase = phase
        effects: list[Effect] = []
        if phase is ReplicaPhase.READY:
            for device, rank in held.devices.items():
                worker.weights[device] = weights_of(worker, device, held.spec, rank)
                effects += self.say(worker, weights_state_of(worker, device))
        return effects + self.group(worker, frame.replica, answer)

    def _ranks_exit(self, worker: Worker, held: Held) -> list[Effect]:
        """Released ranks exit, and fresh ones hold nothing."""
        effects: list[Effect] = []
        for device in held.devices:
            worker.weights.pop(device, None)
            effects += self.say(worker, weights_state_of(worker, device))
        return effects

    def group(
        self, worker: Worker, replica: ReplicaId, phase: GroupPhase, fault: ReasonKind | None = None
    ) -> list[Effect]:
        return self.say(worker, group_state_of(worker, replica, phase, fault))

    def rank_exits(self, worker: Worker, device: str, suspects: tuple[str, ...] = ()) -> list[Effect]:
        """A rank process dies; its daemon lives and says so."""
        return self.say(worker, lose_rank(worker, device, suspects))

    def rank_comes_up(self, worker: Worker) -> list[Effect]:
        """The zygote forked a new rank for the device that lost its own."""
        device = worker.down.popleft()
        return self.say(worker, idle_rank(device))

    def break_stream(self, worker: Worker) -> list[Effect]:
        assert worker.connection is not None
        connection = worker.connection
        worker.disconnect()
        return self.step(WorkerClosed(connection))

    def kill(self, worker: Worker) -> list[Effect]:
        """The process dies, its ranks with it; its lease lives on in etcd."""
        worker.alive = False
        worker.held.clear()
        worker.assigned.clear()
        return self.break_stream(worker) if worker.connection is not None else []

    # ------------------------------------------------------------ gateways

    def add_gateway(
        self, name: str, journals: tuple[JournalInfo, ...] = (), effects: list[Effect] | None = None
    ) -> GatewayPeer:
        peer = GatewayPeer(GatewayId(name), Incarnation(f"{name}-1"))
        self.gateways[peer.gateway] = peer
        happened = self.open_gateway(peer, journals)
        if effects is not None:
            effects.extend(happened)
        return peer

    def open_gateway(
        self, peer: GatewayPeer, journals: tuple[JournalInfo, ...] = (), *, last: bool = True
    ) -> list[Effect]:
        self.connections += 1
        peer.connection = ConnectionId(self.connections)
        peer.sent = 0
        effects = self.step(GatewayOpened(peer.connection, gateway_hello_of(peer)))
        return effects + self.tell(peer, Inventory(journals=journals, last=last))

    def tell(self, peer: GatewayPeer, body: RouteUp) -> list[Effect]:
        assert peer.connection is not None
        if isinstance(body, EndBatch):
            for worker in self.workers.values():
                for ended in body.entries:
                    worker.assigned.pop(ended.request, None)
        peer.sent += 1
        head = Head(term=self.state.term, session=peer.session, seq=peer.sent)
        return self.step(GatewaySaid(peer.connection, head, body))

    def close_gateway(self, peer: GatewayPeer) -> list[Effect]:
        assert peer.connection is not None
        connection, peer.connection = peer.connection, None
        return self.step(GatewayClosed(connection))

    # ------------------------------------------------------------ time

    def tick(self, seconds: float | None = None) -> list[Effect]:
        """Live peers send their heartbeats, then the coordinator ticks."""
        self.now += self.timings.heartbeat_interval if seconds is None else seconds
        effects: list[Effect] = []
        for worker in self._speaking():
            effects += self.beat(worker)
        for peer in list(self.gateways.values()):
            if peer.connection is not None:
                effects += self.tell(peer, GatewayHeartbeat(open_requests=0, journal_tokens=0, loop_lag_ms=0))
        return effects + self.step(Tick())

    def settle(self) -> list[Effect]:
        """etcd, probes and all live workers answer until nothing is left to say."""
        effects: list[Effect] = []
        while (answer := self._next_answer()) is not None:
            effects += answer()
        return effects

    def _next_answer(self) -> Callable[[], list[Effect]] | None:
        for waiting, answer in (
            (self.writes, self.write_next),
            (self.probes, self.probe_next),
            (self.revokes, self.revoke_next),
        ):
            if waiting:
                return answer
        for worker in self._speaking():
            if worker.down:
                return partial(self.rank_comes_up, worker)
            if worker.inbox:
                return partial(self.answer_next, worker)
        return None

    def _speaking(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.session and worker.alive and not worker.stopped]
