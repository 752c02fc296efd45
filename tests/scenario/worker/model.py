"""The worker's core with everything around it played by a few lines: a leader, gateways, rank processes, a clock.

Nothing happens by itself. After every event all invariants are checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from controlplane.runtime.ids import (
    Attempt,
    ClusterId,
    DeploymentId,
    Epoch,
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
    Head,
    Member,
    Permit,
    PermitMode,
    Reason,
    ReasonKind,
    ReplicaSpec,
    Sampling,
)
from controlplane.runtime.messages.serve import Choice, FinishReason, OpenRequest, ServeHello, ServeUp
from controlplane.runtime.messages.session import (
    AttachDown,
    FormGroup,
    LoadReplica,
    PrepareGroup,
    WorkerWelcome,
)
from controlplane.runtime.packing import pack_u32
from controlplane.runtime.timing import derive_timings
from dataplane import frames
from dataplane.core.messages import (
    Effect,
    Event,
    GatewayClosed,
    GatewayOpened,
    GatewaySaid,
    GatewayWritable,
    LeaderClosed,
    LeaderOpened,
    LeaderSaid,
    LinkId,
    RankExited,
    RankForked,
    RankSaid,
    RankSample,
    SendGateway,
    SendRank,
    SpawnRank,
    StreamId,
    Tick,
)
from dataplane.core.state import Identity, Limits
from dataplane.core.step import begin, step
from dataplane.frames import SequenceId

CLUSTER = ClusterId("c" * 32)
NODE = NodeId("w1")
TIMINGS = derive_timings()
TICK_S = TIMINGS.heartbeat_interval / 10
CAPACITY = Capacity(total_blocks=64, block_tokens=16, max_sequences=2, max_batch_tokens=512, max_model_tokens=256)
SPEC = ReplicaSpec(deployment=DeploymentId("m"), model_path="m")
FIRST_PID = 100


class Worker:
    """One daemon's core, driven by hand."""

    def __init__(self, devices: int = 1, limits: Limits | None = None) -> None:
        self.now = 0.0
        names = tuple(f"cpu:{index}" for index in range(devices))
        identity = Identity(
            cluster=CLUSTER,
            node=NODE,
            incarnation=Incarnation("a" * 32),
            serve_address="w1:7801",
            boot_id="boot",
            host="w1",
            pid=10,
            devices=tuple(Device(id=name) for name in names),
        )
        self.state = begin(identity, TIMINGS, self.now, limits)
        self.links = 0
        self.streams: dict[str, StreamId] = {}
        self.sequences: dict[tuple[str, int], SequenceId] = {}
        self.steps = 0
        self.samples: dict[str, RankSample] = {}
        self._pids = FIRST_PID
        self._streams_made = 0
        self._slots = 0

    # ------------------------------------------------------------ time

    def feed(self, event: Event) -> list[Effect]:
        """One event; sequences that are submitted get known by request and choice."""
        effects = step(self.state, event, self.now)
        self.state.check()
        for effect in effects:
            if isinstance(effect, SendRank) and isinstance(effect.frame, frames.Submit):
                self._note(effect.frame)
        return effects

    def tick(self, late: float = 0.0) -> list[Effect]:
        self.now += TICK_S + late
        return self.feed(Tick(self.samples, late))

    def wait(self, seconds: float) -> list[Effect]:
        """Time passes in ticks."""
        end = self.now + seconds
        effects: list[Effect] = []
        while self.now < end:
            effects += self.tick()
        return effects

    def freeze(self, seconds: float) -> list[Effect]:
        """The daemon does not run for a while, then ticks."""
        return self.tick(late=seconds)

    # ------------------------------------------------------------ ranks

    def spawn(self, effects: Sequence[Effect]) -> list[Effect]:
        """Fork what the effects ask for; every rank says Hello."""
        out: list[Effect] = []
        for effect in effects:
            if isinstance(effect, SpawnRank):
                self._pids += 1
                out += self.feed(RankForked(effect.device, self._pids))
                out += self.says(effect.device, frames.Hello(self._pids, effect.device))
        return out

    def says(self, device: str, frame: frames.RankFrame) -> list[Effect]:
        return self.feed(RankSaid(device, self.state.ranks[device].pid, frame))

    def exits(self, device: str, *, code: int | None = None, signal: int | None = None) -> list[Effect]:
        """The device's process ends; a SIGKILL comes from outside."""
        reason = Reason(kind=ReasonKind.PROCESS_EXITED, text=f"{device} ended")
        pid = self.state.ranks[device].pid
        return self.feed(RankExited(device, pid, reason, code, signal, exonerates=signal == 9))

    def step_begins(self, device: str, epoch: int, choices: Sequence[tuple[str, int]]) -> list[Effect]:
        self.steps += 1
        packed = pack_u32(self.sequences[choice] for choice in choices)
        return self.says(device, frames.StepBegun(Epoch(epoch), self.steps, packed))

    def step_ends(
        self,
        device: str,
        epoch: int,
        tokens: Mapping[tuple[str, int], tuple[int, Sequence[int]]],
        finished: Sequence[tuple[str, int]] = (),
    ) -> list[Effect]:
        """The latest step gives each choice (first index, tokens); `finished` end for their length."""
        names = [self.sequences[choice] for choice in tokens]
        return self.says(
            device,
            frames.StepDone(
                epoch=Epoch(epoch),
                step=self.steps,
                sequences=pack_u32(names),
                first_index=pack_u32(first for first, _ in tokens.values()),
                counts=pack_u32(len(values) for _, values in tokens.values()),
                tokens=pack_u32(token for _, values in tokens.values() for token in values),
                logprobs=(),
                finished=tuple(frames.Finished(self.sequences[choice], FinishReason.LENGTH) for choice in finished),
            ),
        )

    def _note(self, frame: frames.Submit) -> None:
        for submission in frame.sequences:
            request, choice = self.state.sequences[submission.sequence]
            self.sequences[request.request, choice.index] = submission.sequence

    # ------------------------------------------------------------ the leader

    @property
    def link(self) -> LinkId:
        return LinkId(self.links)

    def attach(self, term: int = 1) -> list[Effect]:
        """A leader opens a session; its address goes by its term."""
        self.links += 1
        effects = self.feed(LeaderOpened(self.link, f"leader-{term}"))
        welcome = WorkerWelcome(term=Term(term), session=SessionId(self.links), timing=TIMINGS.to_spec())
        return effects + self.leader_says(welcome, term)

    def detach(self) -> list[Effect]:
        return self.feed(LeaderClosed(self.link))

    def leader_says(self, body: AttachDown, term: int = 1) -> list[Effect]:
        return self.feed(LeaderSaid(self.link, Head(term=Term(term), session=SessionId(self.links), seq=1), body))

    def prepare(
        self, replica: str, epoch: int, ranks: Sequence[str], *, term: int = 1, deadline: float = 3.0
    ) -> list[Effect]:
        """`ranks` are devices, rank 0 first; "-" stands for one on another node."""
        members = tuple(
            Member(rank=rank, node=NodeId("w2") if device == "-" else NODE, device=device, host="h")
            for rank, device in enumerate(ranks)
        )
        message = PrepareGroup(
            replica=ReplicaId(replica),
            epoch=Epoch(epoch),
            members=members,
            nonce=f"{replica}@{epoch}",
            spec=SPEC,
            deadline_ms=round(deadline * 1000),
        )
        return self.leader_says(message, term)

    def bring_up(self, replica: str = "r", epoch: int = 1, devices: Sequence[str] = ("cpu:0",)) -> list[Effect]:
        """From idle ranks to READY."""
        name, number = ReplicaId(replica), Epoch(epoch)
        effects = self.prepare(replica, epoch, devices)
        for device in devices:
            effects += self.says(device, frames.Prepared(number, "h:1" if device == devices[0] else "", ""))
        effects += self.leader_says(FormGroup(replica=name, epoch=number, rendezvous="h:1", deadline_ms=3000))
        for device in devices:
            effects += self.says(device, frames.Formed(number))
        effects += self.leader_says(LoadReplica(replica=name, epoch=number, deadline_ms=0))
        for device in devices:
            effects += self.says(device, frames.Loaded(number, CAPACITY, "weights"))
        return effects

    # ------------------------------------------------------------ gateways

    def connect(self, gateway: str, incarnation: str | None = None, term: int = 0) -> list[Effect]:
        """A gateway's stream opens; the shell writes at once whatever is sent on it."""
        self._streams_made += 1
        stream = self.streams[gateway] = StreamId(self._streams_made)
        hello = ServeHello(
            cluster=CLUSTER,
            name=gateway,
            incarnation=Incarnation(incarnation or gateway),
            highest_term_seen=Term(term),
            leader_address="",
            heartbeat_interval_ms=500,
        )
        return self.feed(GatewayOpened(stream, hello))

    def disconnect(self, gateway: str) -> list[Effect]:
        return self.feed(GatewayClosed(self.streams.pop(gateway)))

    def gateway_says(self, gateway: str, body: ServeUp) -> list[Effect]:
        return self.feed(GatewaySaid(self.streams[gateway], body))

    def writable(self, gateway: str) -> list[Effect]:
        return self.feed(GatewayWritable(self.streams[gateway]))

    def flush(self, gateway: str) -> list[Effect]:
        """Let the stream be written until there is nothing more to say."""
        effects: list[Effect] = []
        while more := self.writable(gateway):
            effects += more
        return effects

    def open_body(
        self,
        request: str,
        *,
        attempt: int = 1,
        replica: str = "r",
        epoch: int = 1,
        term: int = 1,
        choices: int = 1,
        delivered: Sequence[int] = (),
        prompt: int = 3,
        max_tokens: int = 100,
        leaderless: bool = False,
        remaining_ms: int = 0,
        render: bytes = b"",
    ) -> OpenRequest:
        """A body; each choice gets the next slot."""
        made: list[Choice] = []
        for index in range(choices):
            self._slots += 1
            made.append(Choice(index=index, slot=Slot(self._slots), seed=index, delivered=pack_u32(delivered)))
        return OpenRequest(
            permit=Permit(
                request=RequestId(request),
                attempt=Attempt(attempt),
                replica=ReplicaId(replica),
                epoch=Epoch(epoch),
                term=Term(term),
                mode=PermitMode.LEADERLESS if leaderless else PermitMode.LEADER,
            ),
            choices=tuple(made),
            prompt=pack_u32(range(prompt)),
            sampling=Sampling(max_tokens=max_tokens),
            render=render,
            remaining_ms=remaining_ms,
        )

    def open(self, gateway: str, request: str, **options: int | bool | Sequence[int] | str | bytes) -> list[Effect]:
        return self.gateway_says(gateway, self.open_body(request, **options))  # type: ignore[arg-type]

    def slots_of(self, request: str) -> tuple[Slot, ...]:
        return tuple(choice.slot for choice in self.state.requests[RequestId(request)].choices)


def serving(devices: int = 1, limits: Limits | None = None) -> Worker:
    """A worker with a leader, a READY replica "r" at epoch 1 over all its devices, and a gateway "g"."""
    worker = Worker(devices, limits)
    worker.attach()
    worker.spawn(worker.tick())
    worker.bring_up(devices=tuple(worker.state.ranks))
    worker.connect("g")
    worker.flush("g")
    return worker


def sent(effects: Sequence[Effect], worker: Worker, gateway: str) -> list[object]:
    """What the effects send to the gateway."""
    stream = worker.streams[gateway]
    return [effect.body for effect in effects if isinstance(effect, SendGateway) and effect.stream == stream]
