"""The actor that owns ClusterState while this process leads: it feeds the pure core and performs its effects.

One mailbox takes everything: frames of sessions, the store's news, outcomes of effects, questions of the admin
API, the tick. Nothing is decided here; each effect that can fail comes back as an event. Items carry the term they
belong to, so that what outlives a term falls away.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar, assert_never

import structlog

from controlplane.connection import Connection
from controlplane.core.messages import (
    AdminAnswered,
    AdminAsked,
    ApplyAsked,
    AskId,
    CloseConnection,
    ConnectionId,
    DeleteDeployment,
    DeletePlacement,
    Effect,
    Event,
    GatewayClosed,
    GatewayOpened,
    LeaseHeard,
    LeaseMuted,
    Probe,
    ProbeDone,
    Recorded,
    RevokeDone,
    RevokeLease,
    SendGateway,
    SendWorker,
    StepDown,
    StoreLoaded,
    Tick,
    Wish,
    WorkerClosed,
    WorkerOpened,
    WriteDeployment,
    WriteDone,
    WritePlacement,
)
from controlplane.core.state import ClusterState, Limits
from controlplane.core.step import step
from controlplane.election import Election, Heard, Lost, Muted, Won
from controlplane.event_log import EventLog
from controlplane.metrics import CoordinatorMetrics
from controlplane.runtime.actor import Mailbox
from controlplane.runtime.clock import Clock
from controlplane.runtime.codec import Envelope
from controlplane.runtime.errors import FencedError, Retryable
from controlplane.runtime.ids import ClusterId, Incarnation, Term
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.route import GatewayHello
from controlplane.runtime.messages.session import WorkerHello
from controlplane.runtime.probe import refused_twice
from controlplane.runtime.records import DeploymentRecord
from controlplane.runtime.timing import Timings
from controlplane.store import PlacementChanged, Store

MAILBOX_ITEMS_MAX = 16_384
BATCH_ITEMS_MAX = 512
"""Items handled between two looks at the loop's other tasks."""

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is."""

    name: str
    incarnation: Incarnation
    cluster: ClusterId
    # host:port of its gRPC server.
    address: str
    pid: int


@dataclass(frozen=True, slots=True)
class _InTerm:
    """An event that means something only in the term it was made for."""

    term: Term
    event: Event


Item = _InTerm | Won | Muted | Heard | Lost


class Coordinator:
    """Runs the core while this process leads; refuses sessions while it does not."""

    def __init__(
        self,
        identity: Identity,
        store: Store,
        election: Election,
        timings: Timings,
        clock: Clock,
        events: EventLog,
        limits: Limits,
        metrics: CoordinatorMetrics,
        initial: DeploymentRecord | None = None,
    ) -> None:
        """`initial` is applied by whichever term finds no deployment of its name in the store."""
        self.identity = identity
        self.events = events
        self._store = store
        self._election = election
        self._timings = timings
        self._clock = clock
        self._limits = limits
        self._metrics = metrics
        self._initial = initial
        self._mailbox: Mailbox[Item] = Mailbox("coordinator", MAILBOX_ITEMS_MAX)
        self._state: ClusterState | None = None
        self._connections: dict[ConnectionId, Connection] = {}
        self._numbers = itertools.count(1)
        self._asks: dict[AskId, asyncio.Future[AdminAnswered]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._store_watch: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ what links and servicers use

    @property
    def term(self) -> Term | None:
        """The term this process leads in; None while it does not lead."""
        return self._state.term if self._state is not None else None

    def connect(self, hello: WorkerHello | GatewayHello, down: Envelope, peer: str) -> Connection | None:
        """Take a session's stream and tell the core; None while this process does not lead."""
        if self._state is None:
            return None
        connection = Connection(ConnectionId(next(self._numbers)), self._state.term, down, peer)
        self._connections[connection.id] = connection
        opened = WorkerOpened if isinstance(hello, WorkerHello) else GatewayOpened
        self._step(opened(connection.id, hello))  # type: ignore[arg-type]
        return connection

    async def hand_in(self, term: Term, event: Event) -> None:
        """A session's frame for the core. Waits while the mailbox is full: backpressure on that peer's stream alone."""
        await self._mailbox.put(_InTerm(term, event))

    async def disconnect(self, connection: Connection, term: Term, *, worker: bool) -> None:
        """The stream of `connection` ended."""
        self._connections.pop(connection.id, None)
        closed = WorkerClosed if worker else GatewayClosed
        await self._mailbox.put(_InTerm(term, closed(connection.id)))

    def view(self, make: Callable[[ClusterState, float], T]) -> T | None:
        """A snapshot of the state made by `make(state, now)`; None while this process does not lead."""
        return make(self._state, self._clock.now()) if self._state is not None else None

    async def ask(self, body: Wish) -> AdminAnswered:
        """Hand an operator's wish to the core and wait for its answer.

        Raises Retryable while this process does not lead or when it loses leadership first.
        """
        if self._state is None:
            raise _not_leader()
        ask = AskId(next(self._numbers))
        answer: asyncio.Future[AdminAnswered] = asyncio.get_running_loop().create_future()
        self._asks[ask] = answer
        await self._mailbox.put(_InTerm(self._state.term, AdminAsked(ask, body)))
        try:
            return await answer
        finally:
            self._asks.pop(ask, None)

    # ------------------------------------------------------------ the actor

    async def run(self) -> None:
        """Eternal. Once it is cancelled, links that still have something to say wait for nobody."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._follow_election())
                tasks.create_task(self._tick())
                while True:
                    self._handle(await self._mailbox.get())
                    for item in self._mailbox.drain(BATCH_ITEMS_MAX):
                        self._handle(item)
                    await asyncio.sleep(0)
        finally:
            self._mailbox.close()

    async def _follow_election(self) -> None:
        async for event in self._election.events():
            await self._mailbox.put(event)

    async def _tick(self) -> None:
        # put_latest: a coordinator that is behind gets one tick, after all input that came before it
        while True:
            await self._clock.sleep(self._timings.heartbeat_interval)
            if self._state is not None:
                self._mailbox.put_latest("tick", _InTerm(self._state.term, Tick()))

    def _handle(self, item: Item) -> None:
        match item:
            case Won():
                self._begin_term(item.term)
            case Lost():
                self._end_term(item.reason)
            case Muted():
                self._step(LeaseMuted(self._election.trouble))
            case Heard():
                self._step(LeaseHeard())
            case _InTerm():
                if item.term == self.term:
                    self._step(item.event)
            case _:
                assert_never(item)

    def _begin_term(self, term: Term) -> None:
        assert self._state is None, "a term begins while another runs"
        assert self._tasks is not None
        self.events.load()
        self._state = ClusterState.new(
            term=term,
            name=self.identity.name,
            incarnation=self.identity.incarnation,
            cluster=self.identity.cluster,
            timings=self._timings,
            limits=self._limits,
            rng_seed=secrets.randbits(64),
            address=self.identity.address,
            pid=self.identity.pid,
        )
        self._store_watch = self._tasks.create_task(self._follow_store(term))
        self.events.record(Recorded("leader_elected", details={"leader": self.identity.name}), term)

    def _end_term(self, reason: Reason) -> None:
        if self._state is None:
            return
        term = self._state.term
        self._state = None
        if self._store_watch is not None:
            self._store_watch.cancel()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        for answer in self._asks.values():
            if not answer.done():
                answer.set_exception(_not_leader())
        self.events.record(Recorded("leader_stepped_down", reason=reason, details={"leader": self.identity.name}), term)

    async def _follow_store(self, term: Term) -> None:
        async with aclosing(self._store.follow(self.identity.name)) as events:
            async for event in events:
                # placements are written by this leader alone; it reads them once, in StoreLoaded
                if isinstance(event, PlacementChanged):
                    continue
                await self._mailbox.put(_InTerm(term, event))
                if isinstance(event, StoreLoaded) and (wish := self._missing(event)) is not None:
                    ask = AdminAsked(AskId(next(self._numbers)), ApplyAsked(wish))
                    await self._mailbox.put(_InTerm(term, ask))

    def _missing(self, loaded: StoreLoaded) -> DeploymentRecord | None:
        """The initial deployment, if the store has none of its name and no operator deleted it."""
        initial = self._initial
        known = loaded.deployments.keys() | loaded.deleted
        return initial if initial is not None and initial.deployment not in known else None

    def _step(self, event: Event) -> None:
        if self._state is None:
            return
        term = self._state.term
        for effect in step(self._state, event, self._clock.now()):
            self._perform(effect, term)

    # ------------------------------------------------------------ effects

    def _perform(self, effect: Effect, term: Term) -> None:
        match effect:
            case SendWorker() | SendGateway():
                if connection := self._connections.get(effect.connection):
                    connection.send(effect.body)
            case CloseConnection():
                if connection := self._connections.pop(effect.connection, None):
                    connection.close()
            case Recorded():
                self._metrics.happened(effect)
                self.events.record(effect, term)
            case AdminAnswered():
                answer = self._asks.get(effect.ask)
                if answer is not None and not answer.done():
                    answer.set_result(effect)
            case StepDown():
                self._spawn(self._election.step_down(effect.reason, effect.pause_s, effect.highest_term))
            case Probe():
                self._spawn(self._probe(effect, term))
            case RevokeLease():
                self._spawn(self._revoke(effect, term))
            case WritePlacement() | DeletePlacement() | WriteDeployment() | DeleteDeployment():
                self._spawn(self._write(effect, term))
            case _:
                assert_never(effect)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._tasks is not None
        self._tasks.create_task(work)

    async def _probe(self, probe: Probe, term: Term) -> None:
        refused = await refused_twice(probe.address, self._timings)
        await self._mailbox.put(_InTerm(term, ProbeDone(probe.node, probe.incarnation, refused)))

    async def _revoke(self, revoke: RevokeLease, term: Term) -> None:
        ok = False
        try:
            # judging needs a fresh lease; this also holds just after the process was stopped, before any event says so
            if self._election.trusted:
                await self._store.revoke_lease(revoke.lease_id)
                ok = True
        except Retryable as error:
            log.warning("lease_revoke_failed", node=revoke.node, error=str(error))
        await self._mailbox.put(_InTerm(term, RevokeDone(revoke.node, revoke.incarnation, ok)))

    async def _write(
        self, effect: WritePlacement | DeletePlacement | WriteDeployment | DeleteDeployment, term: Term
    ) -> None:
        try:
            match effect:
                case WritePlacement():
                    ok = await self._store.write_placement(effect.record)
                case DeletePlacement():
                    ok = await self._store.delete_placement(effect.replica)
                case WriteDeployment():
                    ok = await self._store.write_deployment(effect.record)
                case DeleteDeployment():
                    ok = await self._store.delete_deployment(effect.deployment)
            reason = None if ok else Reason(kind=ReasonKind.NOT_LEADER, text="the leader key is another's")
        except (Retryable, FencedError) as error:
            ok, reason = False, error.reason
        await self._mailbox.put(_InTerm(term, WriteDone(effect.write, ok, reason)))


def _not_leader() -> Retryable:
    return Retryable(Reason(kind=ReasonKind.NOT_LEADER, text="this control plane does not lead"), retry_ms=500)
