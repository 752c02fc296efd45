"""Short ways to write the gateway core's events in tests."""

from __future__ import annotations

from array import array

from controlplane.gateway.messages import (
    AskRoute,
    Deliver,
    Effect,
    Event,
    Failed,
    LeaderOpened,
    LeaderSaid,
    RequestAccepted,
    SendWorker,
    WorkerKey,
    WorkerSaid,
    WorkerUp,
)
from controlplane.gateway.state import GatewayState, JournalLimits
from controlplane.gateway.step import step
from controlplane.runtime.ids import Attempt, DeploymentId, Epoch, NodeId, ReplicaId, RequestId, Slot, Term
from controlplane.runtime.messages.common import Permit, Reason, ReasonKind, ReplicaPhase, Sampling
from controlplane.runtime.messages.route import (
    JournalPhase,
    ReplicaClosed,
    ReplicaRow,
    RouteCode,
    Routed,
    RoutedBatch,
    RouteRefused,
)
from controlplane.runtime.messages.serve import (
    Admitted,
    Finish,
    FinishReason,
    OpenRequest,
    ServeDown,
    StepTokens,
)
from controlplane.runtime.packing import pack_u32
from controlplane.runtime.timing import derive_timings

TIMINGS = derive_timings()
W1, W2 = WorkerKey("w1:1"), WorkerKey("w2:1")
R = RequestId("a" * 32)
WHY = Reason(kind=ReasonKind.PROCESS_EXITED, text="a rank exited")


def accepted(request: RequestId = R, *, n: int = 1, max_tokens: int = 8, deadline: float = 1e6) -> RequestAccepted:
    return RequestAccepted(
        request=request,
        deployment=DeploymentId("demo"),
        prompt=pack_u32([1, 2, 3]),
        sampling=Sampling(max_tokens=max_tokens),
        seeds=tuple(range(n)),
        deadline=deadline,
    )


def routed(
    request: RequestId = R, *, attempt: int = 1, worker: WorkerKey = W1, replica: str = "", epoch: int = 1
) -> LeaderSaid:
    permit = Permit(
        request=request,
        attempt=Attempt(attempt),
        replica=ReplicaId(replica or f"r-{worker}"),
        epoch=Epoch(epoch),
        term=Term(1),
    )
    return LeaderSaid(RoutedBatch(routed=(Routed(permit=permit, serve_address=worker, node=NodeId("n")),)))


def tokens(
    slot: Slot, first: int, values: list[int], *, finish: FinishReason | None = None, worker: WorkerKey = W1
) -> WorkerSaid:
    body = StepTokens(
        slots=pack_u32([slot]),
        first_index=pack_u32([first]),
        counts=pack_u32([len(values)]),
        tokens=pack_u32(values),
        finish=(Finish(slot=slot, reason=finish),) if finish else (),
    )
    return WorkerSaid(worker, body)


def admitted(request: RequestId = R, attempt: int = 1, *, worker: WorkerKey = W1, cached: int = 0) -> WorkerSaid:
    return WorkerSaid(worker, Admitted(request=request, attempt=Attempt(attempt), cached_tokens=cached))


def said(body: ServeDown, worker: WorkerKey = W1) -> WorkerSaid:
    return WorkerSaid(worker, body)


class Core:
    """A gateway's core with a clock, and everything it ever asked for."""

    def __init__(self, limits: JournalLimits | None = None, *, max_retries: int = 3) -> None:
        self.state = GatewayState(timings=TIMINGS, limits=limits or JournalLimits())
        self.state.max_retries[DeploymentId("demo")] = max_retries
        self.now = 100.0
        self.effects: list[Effect] = []

    def do(self, *events: Event) -> list[Effect]:
        """Apply the events, check every invariant after each, and return the effects of all."""
        new: list[Effect] = []
        for event in events:
            new += step(self.state, event, self.now)
            self.state.check()
        self.effects += new
        return new

    def running(self, *, n: int = 1, max_tokens: int = 8) -> list[Slot]:
        """Bring request R to RUNNING on W1; returns its slots by choice."""
        self.do(LeaderOpened(), accepted(n=n, max_tokens=max_tokens), routed(), WorkerUp(W1), admitted())
        return self.slots()

    def slots(self, request: RequestId = R) -> list[Slot]:
        return [choice.slot for choice in self.state.journals[request].choices if choice.slot is not None]

    def delivered(self, choice: int = 0) -> list[int]:
        found = array("I")
        for effect in self.effects:
            if isinstance(effect, Deliver) and effect.choice == choice:
                assert effect.first_index == len(found), "delivered out of order"
                found.extend(effect.tokens)
        return list(found)


def opens(effects: list[Effect]) -> list[OpenRequest]:
    return [
        effect.body for effect in effects if isinstance(effect, SendWorker) and isinstance(effect.body, OpenRequest)
    ]


def asks(effects: list[Effect]) -> list[AskRoute]:
    return [effect for effect in effects if isinstance(effect, AskRoute)]


def failures(effects: list[Effect]) -> list[Failed]:
    return [effect for effect in effects if isinstance(effect, Failed)]


def refused(code: RouteCode, *, attempt: int = 1, retry_ms: int = 0, newest: int = 0) -> LeaderSaid:
    entry = RouteRefused(
        request=R,
        attempt=Attempt(attempt),
        code=code,
        reason=WHY,
        retry_ms=retry_ms,
        newest_attempt=Attempt(newest),
    )
    return LeaderSaid(RoutedBatch(refused=(entry,)))


def closed(worker: str = W1, *, epoch: int = 1, suspects: tuple[RequestId, ...] = (), kind: ReasonKind = WHY.kind):
    reason = Reason(kind=kind, text="closed")
    return LeaderSaid(
        ReplicaClosed(replica=ReplicaId(f"r-{worker}"), epoch=Epoch(epoch), reason=reason, suspects=suspects)
    )


def row(worker: str = W1, *, epoch: int = 1, phase: ReplicaPhase = ReplicaPhase.READY) -> ReplicaRow:
    return ReplicaRow(
        replica=ReplicaId(f"r-{worker}"),
        epoch=Epoch(epoch),
        phase=phase,
        node=NodeId("n"),
        serve_address=worker,
        deployment=DeploymentId("demo"),
        model_path="/m",
        model="m",
        numerics="exact",
    )


def bodies(effects: list[Effect]) -> list[object]:
    return [effect.body for effect in effects if isinstance(effect, SendWorker)]


def phase(core: Core) -> JournalPhase:
    return core.state.journals[R].phase
