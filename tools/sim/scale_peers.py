"""Workers and gateways that answer the leader at once: what they say, and the little that they remember."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from controlplane.core.messages import ConnectionId
from controlplane.runtime.ids import (
    ClusterId,
    Epoch,
    GatewayId,
    Incarnation,
    NodeId,
    ReplicaId,
    RequestId,
    SessionId,
    Term,
)
from controlplane.runtime.messages.common import Capacity, Device, Head, Permit, RankPhase
from controlplane.runtime.messages.route import GatewayHeartbeat, GatewayHello, GatewayWelcome
from controlplane.runtime.messages.session import (
    AbortGroup,
    AttachUp,
    FormGroup,
    GroupPhase,
    GroupState,
    Heartbeat,
    LoadReplica,
    PrepareGroup,
    RankInfo,
    ReplicaLoad,
    WorkerHello,
    WorkerSnapshot,
    WorkerWelcome,
)
from controlplane.runtime.records import NodeRecord

CLUSTER = ClusterId("c" * 32)
DEVICES = 8
CAPACITY = Capacity(total_blocks=4096, block_tokens=16, max_sequences=128, max_batch_tokens=2048, max_model_tokens=8192)

_PHASES = {PrepareGroup: GroupPhase.PREPARED, FormGroup: GroupPhase.FORMED, LoadReplica: GroupPhase.LOADED}


class _Peer:
    def __init__(self, name: str, connection: int) -> None:
        self.name = name
        self.connection = ConnectionId(connection)
        self.incarnation = self.incarnation_of(name)
        self.session = SessionId(0)
        self._sent = 0
        self._received = 0

    @staticmethod
    def incarnation_of(name: str) -> Incarnation:
        return Incarnation(f"{name:0>32}")

    def head(self) -> Head:
        self._sent += 1
        return Head(term=Term(1), session=self.session, seq=self._sent, ack=self._received)


class Worker(_Peer):
    """A daemon with DEVICES ranks."""

    def __init__(self, name: str, connection: int) -> None:
        super().__init__(name, connection)
        self.node = NodeId(name)
        self.alive = True
        self._held: tuple[ReplicaId, Epoch] | None = None
        self._ready = False
        self._running: set[RequestId] = set()
        self._progress = 0

    @property
    def serves(self) -> bool:
        return self._ready

    def record(self) -> NodeRecord:
        return NodeRecord(
            node=self.node,
            incarnation=self.incarnation,
            serve_address=f"{self.name}:2",
            host=self.name,
            pid=1,
            boot_id="",
            lease_id=int(self.connection),
        )

    def hello(self) -> WorkerHello:
        return WorkerHello(
            cluster=CLUSTER,
            node=self.node,
            incarnation=self.incarnation,
            serve_address=f"{self.name}:2",
            boot_id="",
            highest_term_seen=Term(0),
            lease_id=int(self.connection),
            devices=tuple(Device(id=f"cuda:{index}") for index in range(DEVICES)),
            host=self.name,
            pid=1,
        )

    def begin(self, permit: Permit) -> None:
        self._running.add(permit.request)

    def heartbeat(self) -> Heartbeat:
        self._progress += 1
        if self._held is None or not self._ready:
            return Heartbeat(uptime_ms=1)
        replica, epoch = self._held
        load = ReplicaLoad(
            replica=replica,
            epoch=epoch,
            free_blocks=CAPACITY.total_blocks // 2,
            running=len(self._running),
            waiting=0,
            step_ms=20.0,
            progress=self._progress,
        )
        return Heartbeat(uptime_ms=1, replicas=(load,))

    def take(self, body: object) -> Iterator[AttachUp]:
        """What it answers."""
        if not self.alive:
            return
        self._received += 1
        match body:
            case WorkerWelcome(session=session):
                self.session = session
                yield WorkerSnapshot(ranks=self._ranks())
            case PrepareGroup() | FormGroup() | LoadReplica():
                self._held = body.replica, body.epoch
                self._ready = isinstance(body, LoadReplica)
                yield GroupState(
                    replica=body.replica,
                    epoch=body.epoch,
                    phase=_PHASES[type(body)],
                    ok=True,
                    rendezvous=f"{self.name}:29500" if isinstance(body, PrepareGroup) else "",
                    capacity=CAPACITY if self._ready else None,
                )
            case AbortGroup():
                self._held, self._ready = None, False
                self._running.clear()
            case _:
                pass

    def _ranks(self) -> tuple[RankInfo, ...]:
        return tuple(
            RankInfo(
                device=f"cuda:{index}",
                pid=index + 1,
                phase=RankPhase.IDLE,
                replica=ReplicaId(""),
                epoch=Epoch(0),
                rank=0,
            )
            for index in range(DEVICES)
        )


class Gateway(_Peer):
    """Knows which of its requests run where."""

    def __init__(self, name: str, connection: int) -> None:
        super().__init__(name, connection)
        self.placed: dict[tuple[ReplicaId, Epoch], dict[RequestId, int]] = defaultdict(dict)

    def hello(self) -> GatewayHello:
        return GatewayHello(
            cluster=CLUSTER,
            gateway=GatewayId(self.name),
            incarnation=self.incarnation,
            url="",
            highest_term_seen=Term(0),
            pid=1,
            host=self.name,
        )

    def heartbeat(self) -> GatewayHeartbeat:
        return GatewayHeartbeat(open_requests=1, journal_tokens=1, loop_lag_ms=0)

    def take(self, body: object) -> None:
        if isinstance(body, GatewayWelcome):
            self.session = body.session
