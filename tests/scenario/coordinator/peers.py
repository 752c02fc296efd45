"""Modelled workers and gateways: what they hold, and the frames that tell of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from controlplane.core.messages import (
    ConnectionId,
)
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
    ParallelDegrees,
    Permit,
    RankPhase,
    Reason,
    ReasonKind,
    ReplicaPhase,
    ReplicaSpec,
)
from controlplane.runtime.messages.route import (
    GatewayHello,
    RouteEntry,
)
from controlplane.runtime.messages.session import (
    AttachDown,
    GroupPhase,
    GroupState,
    Heartbeat,
    RankInfo,
    RankState,
    ReplicaInfo,
    ReplicaLoad,
    WorkerHello,
    WorkerSnapshot,
    WorkerWelcome,
)
from controlplane.runtime.messages.weights import HeldWeights, PreloadWeights, WeightsState
from controlplane.runtime.records import DeploymentRecord, NodeRecord
from controlplane.runtime.timing import derive_timings

CLUSTER = ClusterId("c" * 32)
TIMINGS = derive_timings()
CAPACITY = Capacity(total_blocks=1000, block_tokens=16, max_sequences=4, max_batch_tokens=512, max_model_tokens=4096)
FAULTS = {
    ReasonKind.GROUP_FAILED: "peer gone",
    ReasonKind.OUT_OF_MEMORY: "weights take 9 GiB of 8",
    ReasonKind.LOAD_FAILED: "config.json: no such file",
}


def deployment(
    name: str = "m",
    replicas: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
    path: str = "/models/m",
    *,
    elastic: bool = False,
    spares: int = 0,
) -> DeploymentRecord:
    degrees = ParallelDegrees(tensor=tensor, pipeline=pipeline)
    spec = ReplicaSpec(deployment=DeploymentId(name), model_path=path, degrees=degrees)
    strategy = "elastic_scaling" if elastic else "checkpoint_restart"
    return DeploymentRecord(
        deployment=DeploymentId(name),
        model=name,
        spec=spec,
        replicas=replicas,
        recovery_strategy=strategy,
        spares=spares,
    )


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
    spec: ReplicaSpec
    progress: int = 0
    # When its daemon last told of it, and how long its ranks were starved until then.
    told: float = 0.0
    starved_s: float = 0.0


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
    # What its rank processes hold, by device.
    weights: dict[str, HeldWeights] = field(default_factory=dict[str, HeldWeights])
    # Devices whose preloads fail.
    unwell: set[str] = field(default_factory=set[str])

    @property
    def address(self) -> str:
        return f"{self.node}:7000"

    def take(self, frame: AttachDown) -> None:
        if isinstance(frame, WorkerWelcome):
            self.session = frame.session
        self.inbox.append(frame)

    def disconnect(self) -> None:
        self.connection, self.session = None, SessionId(0)
        self.inbox.clear()

    def end_sequences(self, replica: ReplicaId) -> None:
        self.assigned = {name: permit for name, permit in self.assigned.items() if permit.replica != replica}

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


def snapshot_of(worker: Worker) -> WorkerSnapshot:
    bound = {
        device: RankInfo(
            device=device,
            pid=200,
            phase=RankPhase.SERVING,
            replica=name,
            epoch=held.epoch,
            rank=rank,
            held=worker.weights.get(device),
        )
        for name, held in worker.held.items()
        for device, rank in held.devices.items()
    }
    free = {
        device: RankInfo(device=device, pid=200, phase=RankPhase.IDLE, held=worker.weights[device])
        for device in worker.devices
        if device in worker.weights and device not in bound
    }
    ranks = tuple((free | bound).values())
    replicas = tuple(
        ReplicaInfo(replica=name, epoch=held.epoch, phase=held.phase, capacity=CAPACITY)
        for name, held in worker.held.items()
    )
    return WorkerSnapshot(ranks=ranks, replicas=replicas, draining=worker.draining)


def heartbeat_of(worker: Worker, now: float) -> Heartbeat:
    """A heartbeat with the loads as they are set; progress moves on unless the load says `stuck`. `starved`: for how
    much of the time the ranks have no processor."""
    loads: list[ReplicaLoad] = []
    for name, held in worker.held.items():
        if held.phase is not ReplicaPhase.READY:
            continue
        values = worker.loads.get(name, {})
        running = sum(permit.replica == name for permit in worker.assigned.values())
        held.progress += 0 if values.get("stuck") else 1
        held.starved_s += values.get("starved", 0.0) * (now - held.told)
        held.told = now
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
                starved_ms=round(held.starved_s * 1000),
            )
        )
    return Heartbeat(uptime_ms=round(now * 1000), replicas=tuple(loads))


def group_state_of(
    worker: Worker, replica: ReplicaId, phase: GroupPhase, fault: ReasonKind | None = None
) -> GroupState:
    held = worker.held[replica]
    first = 0 in held.devices.values()
    return GroupState(
        replica=replica,
        epoch=held.epoch,
        phase=phase,
        ok=fault is None,
        reason=None if fault is None else Reason(kind=fault, text=FAULTS.get(fault, ""), node=worker.node),
        rendezvous=f"{worker.node}.host:29500" if first and phase is GroupPhase.PREPARED else "",
        capacity=CAPACITY if first and phase is GroupPhase.LOADED else None,
    )


def hello_of(worker: Worker, **fields: object) -> WorkerHello:
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
    return WorkerHello(**(values | fields))  # type: ignore[arg-type]


def weights_of(worker: Worker, device: str, spec: ReplicaSpec, rank: int) -> HeldWeights:
    """What a rank process holds once it loaded."""
    return HeldWeights(
        deployment=spec.deployment,
        degrees=spec.degrees,
        rank=rank,
        fingerprint=f"{spec.model_path}/{rank}",
        address=f"{worker.node}/{device}",
    )


def weights_state_of(worker: Worker, device: str, reason: Reason | None = None) -> WeightsState:
    return WeightsState(device=device, pid=200, held=worker.weights.get(device), reason=reason)


def exit_of(replica: ReplicaId, held: Held | None, device: str, suspects: tuple[str, ...]) -> RankState:
    """A rank was killed from within the node; `held`: what it belonged to."""
    return RankState(
        device=device,
        pid=200,
        replica=replica,
        epoch=held.epoch if held else Epoch(0),
        rank=held.devices[device] if held else 0,
        phase=RankPhase.EXITED,
        reason=Reason(kind=ReasonKind.PROCESS_EXITED, text="signal 9"),
        exit_signal=9,
        suspects=tuple(RequestId(name) for name in suspects),
    )


def idle_rank(device: str) -> RankState:
    """A fresh rank is up and belongs to nothing yet."""
    return RankState(device=device, pid=201, replica=ReplicaId(""), epoch=Epoch(0), rank=0, phase=RankPhase.IDLE)


def gateway_hello_of(peer: GatewayPeer) -> GatewayHello:
    return GatewayHello(
        cluster=CLUSTER,
        gateway=peer.gateway,
        incarnation=peer.incarnation,
        url=f"http://{peer.gateway}",
        highest_term_seen=Term(0),
        pid=300,
        host=f"{peer.gateway}.host",
    )


def preload(worker: Worker, frame: PreloadWeights) -> WeightsState:
    """A free rank loads the shard, or says why not."""
    busy = any(frame.device in held.devices for held in worker.held.values())
    if busy or frame.device in worker.unwell:
        kind, text = (ReasonKind.NO_CAPACITY, "busy") if busy else (ReasonKind.LOAD_FAILED, "the disk is gone")
        return weights_state_of(worker, frame.device, Reason(kind=kind, text=text))
    worker.weights[frame.device] = weights_of(worker, frame.device, frame.spec, frame.rank)
    return weights_state_of(worker, frame.device)


def lose_rank(worker: Worker, device: str, suspects: tuple[str, ...]) -> RankState:
    """The rank process on `device` is gone, and what it ran; what its daemon says of it."""
    bound = ((name, held) for name, held in worker.held.items() if device in held.devices)
    name, held = next(bound, (ReplicaId(""), None))
    worker.held.pop(name, None)
    worker.weights.pop(device, None)
    worker.down.append(device)
    worker.end_sequences(name)
    return exit_of(name, held, device, suspects)
