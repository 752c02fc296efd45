"""The worker daemon's state. Only `step` changes it; each invariant stands in `check`."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from controlplane.runtime.ids import (
    Attempt,
    ClusterId,
    Epoch,
    GatewayId,
    Incarnation,
    NodeId,
    ReplicaId,
    RequestId,
    SessionId,
    Slot,
    Term,
)
from controlplane.runtime.messages.common import (
    Capacity,
    Device,
    Permit,
    RankPhase,
    Reason,
    ReplicaPhase,
    Sampling,
)
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.messages.session import GroupPhase, SequencePhase, WorkerHello
from controlplane.runtime.messages.weights import HeldWeights
from controlplane.runtime.timing import Timings
from dataplane import frames
from dataplane.core.messages import DeviceId, DeviceReading, Effect, LinkId, RankSample, StreamId
from dataplane.frames import SequenceId

ADMISSION_FACTOR = 4
"""Sequences a replica admits, running and waiting, as a multiple of what it runs at once."""

SHADOWS_MAX = 8192
SHADOW_BYTES_MAX = 512 * 1024 * 1024
"""Bounds on the requests a daemon remembers; the oldest that no gateway holds goes first."""

RENDER_BYTES_MAX = 64 * 1024

UNFINISHED = (SequencePhase.WAITING, SequencePhase.RUNNING)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a daemon, smaller in tests."""

    admission_factor: int = ADMISSION_FACTOR
    shadows: int = SHADOWS_MAX
    shadow_bytes: int = SHADOW_BYTES_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a daemon is from its start to its end."""

    cluster: ClusterId
    node: NodeId
    incarnation: Incarnation
    serve_address: str
    boot_id: str
    host: str
    pid: int
    devices: tuple[Device, ...]
    versions: tuple[tuple[str, str], ...] = ()

    def hello(self, highest_term: Term, lease_id: int) -> WorkerHello:
        return WorkerHello(
            cluster=self.cluster,
            node=self.node,
            incarnation=self.incarnation,
            serve_address=self.serve_address,
            boot_id=self.boot_id,
            highest_term_seen=highest_term,
            lease_id=lease_id,
            devices=self.devices,
            host=self.host,
            pid=self.pid,
            versions=dict(self.versions),
        )


@dataclass(slots=True)
class Leader:
    """The link to a leader; `session` is None until its Welcome."""

    link: LinkId
    address: str
    term: Term = Term(0)
    session: SessionId | None = None


@dataclass(slots=True)
class Preload:
    """Weights that a free rank is loading."""

    frame: frames.Preload
    # Its progress counter, and when that last changed.
    progress: int
    moved: float


@dataclass(slots=True)
class Rank:
    """One device and the process bound to it."""

    device: DeviceId
    # 0: no process.
    pid: int = 0
    phase: RankPhase = RankPhase.EXITED
    # The epoch it is bound to; "" for none.
    replica: ReplicaId = ReplicaId("")
    epoch: Epoch = Epoch(0)
    rank: int = 0
    # What its process holds of a model.
    held: HeldWeights | None = None
    # What it loads ahead of need, and when it last moved.
    preload: Preload | None = None
    # The epoch whose Abort it has not answered.
    aborting: tuple[ReplicaId, Epoch] | None = None
    # Told to exit.
    leaving: bool = False
    # When an unanswered Abort or Exit ends in a kill.
    let_go_by: float | None = None
    # Why the daemon killed it, if it did.
    killed: Reason | None = None
    # Why it has no process, until it has one.
    fault: Reason | None = None
    # What its driver told of it first, and why the device is sick by what it told since.
    first_reading: DeviceReading | None = None
    sick: Reason | None = None
    # When to fork its next process; None: one is there or on its way.
    spawn_at: float | None = None
    # Processes in a row that ended before their Hello.
    false_starts: int = 0
    sample: RankSample | None = None

    @property
    def bound(self) -> bool:
        """True while a replica epoch has it."""
        return self.replica != ""

    def bind(self, replica: ReplicaId, epoch: Epoch, rank: int) -> None:
        self.replica, self.epoch, self.rank = replica, epoch, rank

    def unbind(self) -> None:
        self.bind(ReplicaId(""), Epoch(0), 0)


@dataclass(slots=True)
class Replica:
    """This node's part of one epoch of a replica."""

    replica: ReplicaId
    epoch: Epoch
    nonce: str
    # Device of rank 0, if it is on this node.
    driver: DeviceId | None
    # Prepares that no rank was free to hear yet.
    prepare: dict[DeviceId, frames.Prepare]
    # Devices that owe the answer to the present stage, and when it is too late.
    owing: set[DeviceId]
    deadline: float | None = None
    phase: ReplicaPhase = ReplicaPhase.PREPARING
    rendezvous: str = ""
    capacity: Capacity | None = None
    load: frames.LoadReport | None = None
    # Load fractions by device.
    loaded: dict[DeviceId, float] = field(default_factory=dict[DeviceId, float])
    # Time in which its ranks here could not have moved, in all.
    starved_s: float = 0.0
    # Stage and thousandths that the leader was told last.
    load_told: tuple[str, int] = ("", 0)
    # Sequences in steps that began and did not end, by step.
    steps: dict[int, array[int]] = field(default_factory=dict[int, "array[int]"])
    # What the leader asked for and is owed: ABORTED or RELEASED.
    ending: GroupPhase | None = None
    # Why it is closed.
    reason: Reason | None = None


@dataclass(slots=True)
class Choice:
    """One choice of a request: its tokens from index 0, and how far the gateway was sent them."""

    index: int
    slot: Slot
    sequence: SequenceId
    tokens: array[int]
    # Tokens that earlier attempts delivered.
    delivered: int
    # Index of the next token to send.
    sent: int
    seed: int
    logprobs: dict[int, frames.Logprobs] = field(default_factory=dict[int, frames.Logprobs])
    prompt_logprobs: list[frames.Logprobs] = field(default_factory=list[frames.Logprobs])
    prompt_logprobs_sent: int = 0
    finish: FinishReason | None = None
    stop_id: int | None = None
    error: Reason | None = None
    finish_sent: bool = False
    # Finished in an earlier attempt: holds no slot.
    closed: bool = False

    @property
    def done(self) -> bool:
        return self.finish is not None or self.closed

    @property
    def pending(self) -> bool:
        """True if the gateway has not been sent all there is."""
        return self.sent < len(self.tokens) or (self.finish is not None and not self.finish_sent)


@dataclass(slots=True)
class Request:
    """One attempt of a request, and its shadow: all another gateway needs to go on with it."""

    permit: Permit
    gateway: GatewayId
    incarnation: Incarnation
    # None: its gateway's stream is gone.
    stream: StreamId | None
    prompt: bytes
    sampling: Sampling
    render: bytes
    choices: list[Choice]
    # What it counts against the bound on shadows.
    bytes_held: int
    phase: SequencePhase = SequencePhase.WAITING
    deadline: float | None = None
    # When an orphaned or lost shadow is dropped.
    expires: float | None = None
    lost: Reason | None = None
    suspect: bool = False
    # Prompt tokens that its first prefill found in the prefix cache.
    cached_tokens: int = 0
    # Its shadow went to a gateway whose Sync is still to come.
    handed: bool = False

    @property
    def request(self) -> RequestId:
        return self.permit.request

    @property
    def attempt(self) -> Attempt:
        return self.permit.attempt

    @property
    def running(self) -> bool:
        """True while its replica computes for it."""
        return self.phase in UNFINISHED


@dataclass(slots=True)
class Stream:
    """A gateway's Serve stream."""

    stream: StreamId
    gateway: GatewayId
    incarnation: Incarnation
    slots: dict[Slot, tuple[Request, Choice]] = field(default_factory=dict[Slot, tuple[Request, Choice]])
    # Slots that have something to send, oldest first.
    dirty: dict[Slot, None] = field(default_factory=dict[Slot, None])
    writable: bool = True
    last_sent: float = 0.0


@dataclass(slots=True)
class Reservation:
    permit: Permit
    lapses: float


@dataclass(slots=True)
class ExchangeCost:
    """What a rank's exchanges of one kind in one group have cost since the daemon began."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class WorkerState:
    identity: Identity
    timings: Timings
    limits: Limits = field(default_factory=Limits)
    # Monotonic seconds when the daemon began.
    started: float = 0.0
    lease_id: int = 0
    highest_term: Term = Term(0)
    leader_address: str = ""
    leader: Leader | None = None
    # Who leads, or led, in the highest term that welcomed this daemon.
    welcomed: tuple[Term, Incarnation] | None = None
    ranks: dict[DeviceId, Rank] = field(default_factory=dict[DeviceId, Rank])
    replicas: dict[ReplicaId, Replica] = field(default_factory=dict[ReplicaId, Replica])
    # Highest epoch met, of replicas that are gone too.
    epochs: dict[ReplicaId, Epoch] = field(default_factory=dict[ReplicaId, Epoch])
    requests: dict[RequestId, Request] = field(default_factory=dict[RequestId, Request])
    sequences: dict[SequenceId, tuple[Request, Choice]] = field(
        default_factory=dict[SequenceId, tuple[Request, Choice]]
    )
    reservations: dict[RequestId, Reservation] = field(default_factory=dict[RequestId, Reservation])
    streams: dict[StreamId, Stream] = field(default_factory=dict[StreamId, Stream])
    next_sequence: int = 1
    shadow_bytes: int = 0
    draining: bool = False
    drained_told: bool = False
    drain_deadline: float | None = None
    leaving: Reason | None = None
    departed: bool = False
    last_tick: float | None = None
    loop_lag: float = 0.0
    last_heartbeat: float = 0.0
    heartbeat_due: bool = False
    # Frames refused for their term, epoch or attempt, by kind.
    fenced: Counter[str] = field(default_factory=Counter[str])
    # What exchanges between ranks have cost, by device, group and kind.
    exchanges: dict[tuple[DeviceId, str, str], ExchangeCost] = field(
        default_factory=dict[tuple[DeviceId, str, str], ExchangeCost]
    )

    def count_exchanges(self, device: DeviceId, costs: Iterable[frames.GroupCost]) -> None:
        """Add what a rank tells of its exchanges."""
        for cost in costs:
            total = self.exchanges.setdefault((device, cost.group, cost.kind), ExchangeCost())
            total.calls += cost.calls
            total.bytes += cost.bytes
            total.seconds += cost.seconds

    def check(self) -> None:
        """Assert every invariant. For tests, after each step."""
        for device, rank in self.ranks.items():
            assert rank.device == device
            assert (rank.pid == 0) == (rank.phase is RankPhase.EXITED), f"{device}: pid {rank.pid} in {rank.phase}"
            if rank.bound:
                assert self.replicas[rank.replica].epoch == rank.epoch
            assert rank.preload is None or (rank.phase is RankPhase.IDLE and not rank.bound), f"{device} loads ahead"
            assert (rank.let_go_by is not None) <= (rank.aborting is not None or rank.leaving)
        for name, replica in self.replicas.items():
            assert self.epochs[name] >= replica.epoch
            bound = {rank.device for rank in self.ranks.values() if rank.replica == name}
            assert replica.owing <= bound
            assert (replica.phase is ReplicaPhase.READY) <= (not replica.owing)
        for sequence, (request, choice) in self.sequences.items():
            assert choice.sequence == sequence
            assert request.running
            assert not choice.done
            assert self.requests[request.request] is request
            holder = self.replicas[request.permit.replica]
            assert holder.epoch == request.permit.epoch
            assert holder.phase is ReplicaPhase.READY
        self._check_requests()

    def _check_requests(self) -> None:
        assert self.shadow_bytes == sum(request.bytes_held for request in self.requests.values())
        for request in self.requests.values():
            assert request.request not in self.reservations
            assert request.running == any(choice.sequence in self.sequences for choice in request.choices)
            assert request.stream is None or request.stream in self.streams
            for choice in request.choices:
                assert choice.delivered <= len(choice.tokens)
                assert choice.sent <= len(choice.tokens)
                assert not choice.finish_sent or choice.sent == len(choice.tokens), "finish went before its last token"
        for stream in self.streams.values():
            assert stream.dirty.keys() <= stream.slots.keys()
            for slot, (request, choice) in stream.slots.items():
                assert choice.slot == slot
                assert request.stream == stream.stream
                assert self.requests.get(request.request) is request


@dataclass(slots=True)
class Turn:
    """One call of `step`: the state, the time, and the effects so far."""

    state: WorkerState
    now: float
    effects: list[Effect] = field(default_factory=list[Effect])

    def emit(self, effect: Effect) -> None:
        self.effects.append(effect)
