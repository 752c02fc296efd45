"""A tiny cluster around the coordinator's core: etcd as two dicts, workers and gateways as a few lines each.

Nothing happens by itself: whoever drives the model (a text scenario, a random machine, a unit test) says which worker
answers next, whether a write succeeds, and when time passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from controlplane.core.messages import (
    CloseConnection,
    ConnectionId,
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
from controlplane.runtime.ids import (
    Attempt,
    ClusterId,
    DeploymentId,
    Epoch,
    GatewayId,
    Incarnation,
    NodeId,
    ReplicaId,
    RequestId,
    SessionId,
    Term,
)
from controlplane.runtime.messages.common import (
    Capacity,
    Device,
    Head,
    ParallelDegrees,
    Permit,
    RankPhase,
    Reason,
    ReasonKind,
    ReplicaPhase,
    ReplicaSpec,
)
from controlplane.runtime.messages.route import (
    EndBatch,
    GatewayHeartbeat,
    GatewayHello,
    GatewayWelcome,
    Inventory,
    JournalInfo,
    RouteEntry,
    RouteUp,
)
from controlplane.runtime.messages.session import (
    AbortGroup,
    AssignBatch,
    AttachDown,
    AttachUp,
    Drained,
    DrainNode,
    FormGroup,
    GroupPhase,
    GroupState,
    Heartbeat,
    LoadReplica,
    PrepareGroup,
    RankInfo,
    RankState,
    ReleaseReplica,
    ReplicaInfo,
    ReplicaLoad,
    UndrainNode,
    WorkerHello,
    WorkerSnapshot,
    WorkerWelcome,
)
from controlplane.runtime.records import DeploymentRecord, NodeRecord, PlacementRecord
from controlplane.runtime.timing import Timings, derive_timings
from tests.scenario.coordinator.duties import Duties

CLUSTER = ClusterId("c" * 32)
TIMINGS = derive_timings()
CAPACITY = Capacity(total_blocks=1000, block_tokens=16, max_sequences=4, max_batch_tokens=512, max_model_tokens=4096)


def deployment(
    name: str = "m", replicas: int = 1, tensor: int = 1, pipeline: int = 1, path: str = "/models/m"
) -> DeploymentRecord:
    degrees = ParallelDegrees(tensor=tensor, pipeline=pipeline)
    spec = ReplicaSpec(deployment=DeploymentId(name), model_path=path, degrees=degrees)
    return DeploymentRecord(deployment=DeploymentId(name), model=name, spec=spec, replicas=replicas)


def entry(request: str, *, prompt: int = 100, max_tokens: int = 50, name: str = "m", **fields: object) -> RouteEntry:
    return RouteEntry(
        request=RequestId(request),
        attempt=Attempt(int(str(fields.pop("attempt", 1)))),
        deployment=DeploymentId(name),
        prompt_tokens=prompt,
        max_tokens=max_tokens,
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class Held:
    """A replica as a worker holds it."""

    epoch: Epoch
    phase: ReplicaPhase
    devices: dict[str, int]
    progress: int = 0


@dataclass
class Worker:
    node: NodeId
    incarnation: Incarnation
    lease: int
    devices: tuple[str, ...]
    alive: bool = True
    # Hung: takes nothing in, says nothing.
    stopped: bool = False
    # Its port refuses connects although it lives.
    refuses: bool = False
    draining: bool = False
    connection: ConnectionId | None = None
    session: SessionId = SessionId(0)
    sent: int = 0
    received: int = 0
    inbox: deque[AttachDown] = field(default_factory=deque[AttachDown])
    held: dict[ReplicaId, Held] = field(default_factory=dict[ReplicaId, Held])
    assigned: dict[RequestId, Permit] = field(default_factory=dict[RequestId, Permit])
    # What its heartbeats say of a replica beside epoch and progress.
    loads: dict[ReplicaId, dict[str, float]] = field(default_factory=dict[ReplicaId, dict[str, float]])
    # Devices whose rank process is being started again.
    down: deque[str] = field(default_factory=deque[str])
    weights: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def address(self) -> str:
        return f"{self.node}:7000"

    def record(self) -> NodeRecord:
        return NodeRecord(
            node=self.node,
            incarnation=self.incarnation,
            serve_address=self.address,
            host=f"{self.node}.host",
            pid=100,
            boot_id="boot",
            lease_id=self.lease,
        )


@dataclass
class GatewayPeer:
    gateway: GatewayId
    incarnation: Incarnation
    connection: ConnectionId | None = None
    session: SessionId = SessionId(0)
    sent: int = 0


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
        self.writes: deque[WritePlacement | DeletePlacement | WriteDeployment] = deque()
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
                worker = next((one for one in self.workers.values() if one.connection == effect.connection), None)
                if worker is not None:
                    if isinstance(effect.body, WorkerWelcome):
                        worker.session = effect.body.session
                    worker.inbox.append(effect.body)
            case SendGateway():
                for gateway in self.gateways.values():
                    if gateway.connection == effect.connection and isinstance(effect.body, GatewayWelcome):
                        gateway.session = effect.body.session
            case CloseConnection():
                self._closed_from_above(effect.connection)
            case WritePlacement() | DeletePlacement() | WriteDeployment():
                self.writes.append(effect)
            case Probe():
                self.probes.append(effect)
            case RevokeLease():
                self.revokes.append(effect)
            case _:
                pass

    def successor(self) -> Cluster:
        """Another control plane, just elected: the same etcd, the same peers without a session."""
        other = Cluster(term=self.state.term + 1, limits=self.state.limits, timings=self.timings)
        other.now, other.leases, other.watch, other.etcd_up = self.now, self.leases, self.watch, True
        other.keys, other.placements, other.deployments = self.keys, self.placements, self.deployments
        for worker in self.workers.values():
            worker.connection, worker.session = None, SessionId(0)
            worker.inbox.clear()
        for peer in self.gateways.values():
            peer.connection = None
        other.workers, other.gateways = self.workers, self.gateways
        return other

    def _closed_from_above(self, connection: ConnectionId) -> None:
        for worker in self.workers.values():
            if worker.connection == connection:
                worker.connection, worker.session = None, SessionId(0)
                worker.inbox.clear()
        for peer in self.gateways.values():
            if peer.connection == connection:
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
        worker = Worker(
            node,
            Incarnation(f"{name}-{self.leases}"),
            self.leases,
            tuple(f"cpu:{index}" for index in range(devices)),
        )
        self.workers[node] = worker
        return worker

    def attach(self, worker: Worker) -> list[Effect]:
        """Open a session and send the whole Snapshot."""
        effects = self.hello(worker)
        return effects + self.say(worker, self.snapshot_of(worker)) if worker.session else effects

    def hello(self, worker: Worker, **fields: object) -> list[Effect]:
        self.connections += 1
        worker.connection = ConnectionId(self.connections)
        worker.session, worker.sent, worker.received = SessionId(0), 0, 0
        worker.inbox.clear()
        values: dict[str, object] = {
            "cluster": CLUSTER,
            "node": worker.node,
            "incarnation": worker.incarnation,
            "serve_address": worker.address,
            "boot_id": "boot",
            "highest_term_seen": Term(0),
            "lease_id": worker.lease,
            "devices": tuple(Device(id=device) for device in worker.devices),
            "host": f"{worker.node}.host",
            "pid": 100,
        }
        return self.step(WorkerOpened(worker.connection, WorkerHello(**(values | fields))))  # type: ignore[arg-type]

    def snapshot_of(self, worker: Worker) -> WorkerSnapshot:
        ranks = tuple(
            RankInfo(
                device=device,
                pid=200,
                phase=RankPhase.SERVING,
                replica=name,
                epoch=held.epoch,
                rank=rank,
                weights=worker.weights.get(device, ""),
            )
            for name, held in worker.held.items()
            for device, rank in held.devices.items()
        )
        replicas = tuple(
            ReplicaInfo(replica=name, epoch=held.epoch, phase=held.phase, capacity=CAPACITY)
            for name, held in worker.held.items()
        )
        return WorkerSnapshot(ranks=ranks, replicas=replicas, draining=worker.draining)

    def say(self, worker: Worker, body: AttachUp) -> list[Effect]:
        assert worker.connection is not None
        worker.sent += 1
        head = Head(term=self.state.term, session=worker.session, seq=worker.sent, ack=worker.received)
        return self.step(WorkerSaid(worker.connection, head, body))

    def beat(self, worker: Worker) -> list[Effect]:
        """A heartbeat with the loads as they are set; progress moves on unless the load says `stuck`."""
        loads: list[ReplicaLoad] = []
        for name, held in worker.held.items():
            if held.phase is not ReplicaPhase.READY:
                continue
            values = worker.loads.get(name, {})
            running = sum(permit.replica == name for permit in worker.assigned.values())
            held.progress += 0 if values.get("stuck") else 1
            loads.append(
                ReplicaLoad(
                    replica=name,
                    epoch=held.epoch,
                    free_blocks=int(values.get("free", CAPACITY.total_blocks)),
                    running=int(values.get("running", running)),
                    waiting=int(values.get("waiting", 0)),
                    step_ms=values.get("step_ms", 10.0),
                    progress=held.progress,
                    waiting_tokens=int(values.get("waiting_tokens", 0)),
                )
            )
        return self.say(worker, Heartbeat(uptime_ms=1, replicas=tuple(loads)))

    def answer_next(self, worker: Worker) -> list[Effect]:
        """The worker handles its oldest frame."""
        frame = worker.inbox.popleft()
        worker.received += 1
        match frame:
            case PrepareGroup():
                devices = {m.device: m.rank for m in frame.members if m.node == worker.node}
                holders = [name for name, held in worker.held.items() if held.devices.keys() & devices.keys()]
                assert set(holders) <= {frame.replica}, f"{frame.replica} prepares on devices of {holders}"
                worker.held[frame.replica] = Held(frame.epoch, ReplicaPhase.PREPARING, devices)
                return self.group(worker, frame.replica, GroupPhase.PREPARED)
            case FormGroup():
                return self._advance(worker, frame, ReplicaPhase.FORMING, GroupPhase.FORMED)
            case LoadReplica():
                return self._advance(worker, frame, ReplicaPhase.READY, GroupPhase.LOADED)
            case AbortGroup() | ReleaseReplica():
                held = worker.held.get(frame.replica)
                if held is not None and held.epoch <= frame.epoch:
                    del worker.held[frame.replica]
                    self._end_sequences(worker, frame.replica)
            case AssignBatch():
                worker.assigned.update({permit.request: permit for permit in frame.permits})
            case DrainNode():
                worker.draining = True
                return self.say(worker, Drained()) if not worker.assigned else []
            case UndrainNode():
                worker.draining = False
            case _:
                pass
        return []

    def _advance(
        self, worker: Worker, frame: FormGroup | LoadReplica, phase: ReplicaPhase, answer: GroupPhase
    ) -> list[Effect]:
        held = worker.held.get(frame.replica)
        if held is None or held.epoch != frame.epoch:
            return []
        held.phase = phase
        if phase is ReplicaPhase.READY:
            for device in held.devices:
                worker.weights[device] = "fingerprint"
        return self.group(worker, frame.replica, answer)

    def group(self, worker: Worker, replica: ReplicaId, phase: GroupPhase, *, ok: bool = True) -> list[Effect]:
        held = worker.held[replica]
        first = 0 in held.devices.values()
        return self.say(
            worker,
            GroupState(
                replica=replica,
                epoch=held.epoch,
                phase=phase,
                ok=ok,
                reason=None if ok else Reason(kind=ReasonKind.GROUP_FAILED, text="peer gone", node=worker.node),
                rendezvous=f"{worker.node}.host:29500" if first and phase is GroupPhase.PREPARED else "",
                capacity=CAPACITY if first and phase is GroupPhase.LOADED else None,
            ),
        )

    def rank_exits(self, worker: Worker, device: str, suspects: tuple[str, ...] = ()) -> list[Effect]:
        """A rank process dies; its daemon lives and says so."""
        name, held = next((name, held) for name, held in worker.held.items() if device in held.devices)
        del worker.held[name]
        worker.weights.pop(device, None)
        worker.down.append(device)
        self._end_sequences(worker, name)
        return self.say(
            worker,
            RankState(
                device=device,
                pid=200,
                replica=name,
                epoch=held.epoch,
                rank=held.devices[device],
                phase=RankPhase.EXITED,
                reason=Reason(kind=ReasonKind.PROCESS_EXITED, text="signal 9", node=worker.node),
                exit_signal=9,
                suspects=tuple(RequestId(name) for name in suspects),
            ),
        )

    def rank_comes_up(self, worker: Worker) -> list[Effect]:
        """The zygote forked a new rank for the device that lost its own."""
        device = worker.down.popleft()
        state = RankState(device=device, pid=201, replica=ReplicaId(""), epoch=Epoch(0), rank=0, phase=RankPhase.IDLE)
        return self.say(worker, state)

    @staticmethod
    def _end_sequences(worker: Worker, replica: ReplicaId) -> None:
        for request in [name for name, permit in worker.assigned.items() if permit.replica == replica]:
            del worker.assigned[request]

    def break_stream(self, worker: Worker) -> list[Effect]:
        assert worker.connection is not None
        connection, worker.connection, worker.session = worker.connection, None, SessionId(0)
        worker.inbox.clear()
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
        hello = GatewayHello(
            cluster=CLUSTER,
            gateway=peer.gateway,
            incarnation=peer.incarnation,
            url=f"http://{peer.gateway}",
            highest_term_seen=Term(0),
            pid=300,
            host=f"{peer.gateway}.host",
        )
        effects = self.step(GatewayOpened(peer.connection, hello))
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
        for worker in list(self.workers.values()):
            if worker.session and worker.alive and not worker.stopped:
                effects += self.beat(worker)
        for peer in list(self.gateways.values()):
            if peer.connection is not None:
                effects += self.tell(peer, GatewayHeartbeat(open_requests=0, journal_tokens=0, loop_lag_ms=0))
        return effects + self.step(Tick())

    def settle(self) -> list[Effect]:
        """etcd, probes and all live workers answer until nothing is left to say."""
        effects: list[Effect] = []
        busy = True
        while busy:
            busy = False
            while self.writes:
                effects += self.write_next()
                busy = True
            while self.probes:
                effects += self.probe_next()
                busy = True
            while self.revokes:
                effects += self.revoke_next()
                busy = True
            for worker in list(self.workers.values()):
                while worker.down and worker.alive and worker.session:
                    effects += self.rank_comes_up(worker)
                    busy = True
                while worker.inbox and worker.alive and not worker.stopped and worker.connection is not None:
                    effects += self.answer_next(worker)
                    busy = True
        return effects
