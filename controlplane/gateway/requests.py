"""The shell around the gateway's core: takes events, performs effects. The only owner of the journals."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import structlog

from controlplane.gateway.feed import Sink
from controlplane.gateway.leader_link import LeaderLink
from controlplane.gateway.messages import (
    AskRoute,
    ChoiceStopped,
    ClientDrained,
    ClientGone,
    ConnectWorker,
    Counted,
    Deliver,
    DropWorker,
    Effect,
    Event,
    Failed,
    Failure,
    LeaderLost,
    LeaderOpened,
    LeaderSaid,
    Moved,
    RequestAccepted,
    ResumeAsked,
    ResumeDropped,
    SendWorker,
    ShadowFound,
    Started,
    StreamAdopted,
    TellEnd,
    TellFirstToken,
    TellJournal,
    Tick,
    WorkerBroken,
    WorkerGone,
    WorkerKey,
    WorkerSaid,
    WorkerUp,
)
from controlplane.gateway.metrics import GatewayMetrics
from controlplane.gateway.state import GatewayState
from controlplane.gateway.step import step
from controlplane.gateway.worker_streams import WorkerStreams
from controlplane.runtime.clock import Clock
from controlplane.runtime.ids import RequestId, Term
from controlplane.runtime.messages.common import Reason
from controlplane.runtime.messages.route import Inventory, JournalPhase, ReplicaTable, RouteDown
from controlplane.runtime.messages.serve import ServeDown

log = structlog.get_logger()


class Requests:
    """All open requests of this gateway. Its methods return at once; what they cause is performed before they do."""

    def __init__(
        self,
        state: GatewayState,
        clock: Clock,
        metrics: GatewayMetrics,
        on_rows: Callable[[], None],
    ) -> None:
        self.state = state
        self._clock = clock
        self._metrics = metrics
        self._on_rows = on_rows
        self._sinks: dict[RequestId, Sink] = {}
        # Streams being resumed; the answers that are still to come.
        self._claimed: set[RequestId] = set()
        self._finding: dict[RequestId, asyncio.Future[ShadowFound]] = {}
        self._releasing = False
        self._events: deque[Event] = deque()
        self._stepping = False
        self._leader: LeaderLink | None = None
        self._workers: WorkerStreams | None = None

    def attach(self, leader: LeaderLink, workers: WorkerStreams) -> None:
        """Name the two ways out; to be called once, before anything else."""
        self._leader, self._workers = leader, workers

    def open(self, asked: RequestAccepted, sink: Sink) -> None:
        """Open a journal whose deliveries reach `sink`."""
        assert asked.request not in self._sinks, "request ids are drawn, or checked by `is_open`"
        self._sinks[asked.request] = sink
        self._post(asked)

    def is_open(self, request: RequestId) -> bool:
        return request in self._sinks or request in self._claimed

    @contextmanager
    def claim(self, request: RequestId) -> Iterator[bool]:
        """Nobody else resumes the stream within; False if somebody does already."""
        if request in self._claimed:
            yield False
            return
        self._claimed.add(request)
        try:
            yield True
        finally:
            self._claimed.discard(request)

    async def find(self, request: RequestId) -> ShadowFound:
        """Ask the workers for a claimed stream's shadow; answered within a session's silence."""
        assert request in self._claimed, "claim it first"
        answer = self._finding[request] = asyncio.get_running_loop().create_future()
        try:
            self._post(ResumeAsked(request))
            return await answer
        finally:
            del self._finding[request]
            if not answer.done() or answer.cancelled():
                self._post(ResumeDropped(request))

    def adopt(self, adopted: StreamAdopted, sink: Sink) -> None:
        """Go on with a found stream; its deliveries reach `sink`."""
        assert adopted.asked.request not in self._sinks, "a search lets an own journal go"
        self._sinks[adopted.asked.request] = sink
        self._post(adopted)

    def release(self) -> None:
        """From now on a client that is cut off leaves its sequences at their workers, to be resumed elsewhere."""
        self._releasing = True

    def stop_choice(self, request: RequestId, choice: int) -> None:
        self._post(ChoiceStopped(request, choice))

    def leave(self, request: RequestId, *, complete: bool) -> None:
        """The client took everything (`complete`), or is gone: its sequences are freed."""
        if self._sinks.pop(request, None) is None:
            return
        if complete:
            self._metrics.requests.labels("finished").inc()
            self._post(ClientDrained(request))
        elif self._releasing:
            self._metrics.requests.labels("released").inc()
        else:
            self._metrics.requests.labels("client_gone").inc()
            self._post(ClientGone(request))

    @property
    def open_requests(self) -> int:
        return len(self.state.journals)

    @property
    def cut_off(self) -> bool:
        """This gateway reaches none of the workers that serve."""
        return self.state.cut_off_s(self._clock.now()) > 0

    @property
    def apart(self) -> bool:
        """It has been so for so long that the workers must be well: their leader would have noticed otherwise."""
        return self.state.cut_off_s(self._clock.now()) >= self.state.timings.leader_grace

    def tick(self) -> None:
        self._post(Tick())

    # ------------------------------------------------------------ the leader's link

    def leader_opened(self, term: Term) -> Iterable[Inventory]:
        chunks = list(self.state.inventory(self._clock.now()))
        self._post(LeaderOpened(term))
        return chunks

    def leader_lost(self) -> None:
        self._post(LeaderLost())

    def leader_said(self, body: RouteDown) -> None:
        self._post(LeaderSaid(body))
        if isinstance(body, ReplicaTable):
            self._on_rows()

    def load(self) -> tuple[int, int]:
        return len(self.state.journals), self.state.journal_tokens

    # ------------------------------------------------------------ worker streams

    def worker_up(self, worker: WorkerKey) -> None:
        self._post(WorkerUp(worker))

    def worker_broken(self, worker: WorkerKey, heard: float) -> None:
        self._post(WorkerBroken(worker, heard))

    def worker_gone(self, worker: WorkerKey, reason: Reason) -> None:
        log.info("worker_given_up", worker=worker, reason=reason.text)
        self._post(WorkerGone(worker, reason))

    def worker_said(self, worker: WorkerKey, body: ServeDown) -> None:
        self._post(WorkerSaid(worker, body))

    # ------------------------------------------------------------ decide, then do

    def _post(self, event: Event) -> None:
        """Step, and perform; an event that performing causes comes after it."""
        self._events.append(event)
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._events:
                for effect in step(self.state, self._events.popleft(), self._clock.now()):
                    self._perform(effect)
        finally:
            self._stepping = False

    def _perform(self, effect: Effect) -> None:
        assert self._leader is not None
        assert self._workers is not None
        match effect:
            case Deliver():
                sink = self._sinks.get(effect.request)
                if sink is not None:
                    sink.deliver(effect)
            case SendWorker():
                self._workers.send(effect.worker, effect.body)
            case AskRoute():
                self._leader.ask(effect.entry)
            case TellEnd():
                self._leader.end(effect.entry)
            case TellJournal():
                self._leader.adopted(effect.info)
            case TellFirstToken():
                self._leader.first_token(effect.token)
            case ShadowFound():
                answer = self._finding.get(effect.request)
                if answer is not None and not answer.done():
                    answer.set_result(effect)
            case Started():
                if (sink := self._sinks.get(effect.request)) is not None:
                    sink.started(effect.cached_tokens)
            case Failed():
                self._fail(effect)
            case Moved():
                self._metrics.moves.labels("planned" if effect.planned else "lost").inc()
                log.info(
                    "request_moved",
                    request=effect.request,
                    attempt=effect.attempt,
                    reason=effect.reason.kind.name,
                    text=effect.reason.text,
                )
            case Counted():
                self._metrics.dropped.labels(effect.name).inc(effect.amount)
            case ConnectWorker():
                self._workers.connect(effect.worker, effect.node)
            case DropWorker():
                self._workers.drop(effect.worker)

    def _fail(self, failed: Failed) -> None:
        self._metrics.requests.labels(failed.failure.value).inc()
        if failed.failure not in (Failure.OVERLOADED, Failure.UNKNOWN_MODEL, Failure.TOO_LONG):
            log.info("request_failed", request=failed.request, failure=failed.failure.value, reason=failed.reason.text)
        sink = self._sinks.pop(failed.request, None)
        if sink is not None:
            sink.failed(failed)

    def phases(self) -> dict[JournalPhase, int]:
        """Open journals by phase."""
        found = Counter(journal.phase for journal in self.state.journals.values())
        return {phase: found.get(phase, 0) for phase in JournalPhase}
