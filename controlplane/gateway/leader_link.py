"""The gateway's session with the leading coordinator: client of Routing.Route."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, cast

import grpc.aio
import structlog

from controlplane.gateway.outbox import Outbox
from controlplane.gateway.silence import Silence
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.calls import StreamEnded, read_frame, write_frame
from controlplane.runtime.clock import Clock
from controlplane.runtime.codec import UnknownBody, WireError
from controlplane.runtime.ids import ClusterId, GatewayId, Incarnation, SessionId, Term
from controlplane.runtime.messages.common import Head
from controlplane.runtime.messages.route import (
    EndBatch,
    EndEntry,
    FirstToken,
    FirstTokens,
    GatewayHeartbeat,
    GatewayHello,
    GatewayWelcome,
    Inventory,
    JournalInfo,
    RouteBatch,
    RouteDown,
    RouteEntry,
    RouteUp,
)
from controlplane.runtime.messages.session import Fenced, SessionRefused
from controlplane.runtime.timing import Timings, channel_options
from controlplane.runtime.wire import ROUTE_DOWN, ROUTE_UP
from protos.perdure.v1 import route_pb2_grpc

OUTBOX_MAX = 65536
BATCH_MAX = 256
"""Entries of one Route frame."""

log = structlog.get_logger()

Item = RouteUp | RouteEntry | EndEntry | FirstToken
"""What is sent: frames, and entries that travel with their like."""

_BATCHES: dict[type, Callable[[tuple[Any, ...]], RouteUp]] = {
    RouteEntry: lambda entries: RouteBatch(entries=entries),
    EndEntry: lambda entries: EndBatch(entries=entries),
    FirstToken: lambda entries: FirstTokens(entries=entries),
}


class LeaderSource(Protocol):
    """Who leads, as far as this process knows."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it may be, best first."""
        ...

    @property
    def highest_term(self) -> Term: ...

    async def changed(self) -> Any: ...

    def hint(self, address: str, term: Term) -> Any: ...

    def meet(self, term: Term, incarnation: Incarnation) -> Any: ...


class RouteOwner(Protocol):
    """Whom the link serves; every method returns at once."""

    def leader_opened(self, term: Term) -> Iterable[Inventory]: ...

    def leader_lost(self) -> None: ...

    def leader_said(self, body: RouteDown) -> None: ...

    def load(self) -> tuple[int, int]:
        """Open requests and journal tokens."""
        ...


@dataclass(frozen=True, slots=True)
class GatewayIdentity:
    """What both kinds of hello say about this gateway."""

    cluster: ClusterId
    gateway: GatewayId
    incarnation: Incarnation
    url: str
    pid: int
    host: str


class LeaderLink:
    """Finds the leader, keeps one session with it, and takes it up again with its successor."""

    def __init__(
        self, identity: GatewayIdentity, leader: LeaderSource, timings: Timings, clock: Clock, owner: RouteOwner
    ) -> None:
        self._identity = identity
        self._leader = leader
        self._timings = timings
        self._clock = clock
        self._owner = owner
        self._session: LeaderSession | None = None
        self._backoff = Backoff(timings, random.Random())
        self.lost_at: float | None = clock.now()
        self.fenced = 0
        self._failures = 0

    @property
    def term(self) -> Term | None:
        """Term of the session, or None without one."""
        return self._session.term if self._session is not None else None

    @property
    def idle(self) -> bool:
        """Nothing waits to be sent."""
        return self._session is None or self._session.idle

    # ------------------------------------------------------------ what the owner tells

    def ask(self, entry: RouteEntry) -> None:
        """Ask where an attempt may run. Without a session the next inventory asks."""
        if self._session is not None:
            self._session.send(entry)

    def end(self, entry: EndEntry) -> None:
        """Tell that a request ended. Without a session its absence from the inventory tells it."""
        if self._session is not None:
            self._session.send(entry)

    def adopted(self, journal: JournalInfo) -> None:
        """Tell of a journal taken over from another gateway. Without a session the next inventory tells it."""
        if self._session is not None:
            self._session.send(Inventory(journals=(journal,), last=False))

    def first_token(self, token: FirstToken) -> None:
        """Tell that a lost request goes on. Without a session nobody keeps the timeline."""
        if self._session is not None:
            self._session.send(token)

    # ------------------------------------------------------------ one session after the other

    async def run(self) -> None:
        """Eternal: one session after the other."""
        while True:
            addresses = self._leader.addresses
            if not addresses:
                await self._leader.changed()
                continue
            address = addresses[self._failures % len(addresses)]
            self._failures += 1
            failure = await self._attend(address)
            log.info("leader_session_ended", leader=address, reason=failure)
            await self._clock.sleep(self._backoff.next())

    async def _attend(self, address: str) -> str:
        """One session with that leader; returns why it ended."""
        newer = asyncio.create_task(self._newer_leader(address), name="leader_newer")
        session = asyncio.create_task(self._converse(address), name="leader_session")
        try:
            done, _ = await asyncio.wait({newer, session}, return_when=asyncio.FIRST_COMPLETED)
            return session.result() if session in done else "another leader is known"
        finally:
            newer.cancel()
            session.cancel()
            await asyncio.gather(newer, session, return_exceptions=True)
            self._close_session()

    async def _newer_leader(self, address: str) -> None:
        """Returns when someone else leads. A leader that etcd no longer names may still route: stay with it, unless a
        higher term than its own was met."""
        while True:
            await self._leader.changed()
            if self._session is not None and self._leader.highest_term > self._session.term:
                return
            if self._leader.addresses and self._leader.addresses[0] != address:
                return

    def _close_session(self) -> None:
        if self._session is not None:
            self._session = None
            self.lost_at = self._clock.now()
            self._owner.leader_lost()

    async def _converse(self, address: str) -> str:
        async with grpc.aio.insecure_channel(address, options=channel_options(self._timings)) as channel:
            call = route_pb2_grpc.RoutingStub(channel).Route()
            try:
                welcome = await self._greet(call)
                if isinstance(welcome, str):
                    return welcome
                return await self._hold(_Session(call, welcome, self._timings, self._clock))
            except StreamEnded as error:
                return str(error)
            except WireError as error:
                log.warning("frame_refused", peer=address, error=str(error))
                return str(error)
            finally:
                call.cancel()

    async def _greet(self, call: Any) -> GatewayWelcome | str:
        await write_frame(call, ROUTE_UP.encode(*self._hello()))
        try:
            async with asyncio.timeout(self._timings.session_silence):
                answer = ROUTE_DOWN.decode(await read_frame(call))
        except TimeoutError:
            return "no welcome in time"
        return self._welcomed(answer)

    async def _hold(self, session: _Session) -> str:
        """The session from its welcome to its end, which is what it returns or raises."""
        self._open_session(session)
        tasks = [
            asyncio.create_task(session.write(), name="leader_write"),
            asyncio.create_task(session.beat(self._owner), name="leader_beat"),
            asyncio.create_task(self._read(session), name="leader_read"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, session: _Session) -> str:
        while True:
            frame = await session.read()
            if self._fences(session, Term(frame.head.term), frame.WhichOneof("body") or ""):
                continue
            try:
                body = ROUTE_DOWN.decode(frame)
            except UnknownBody:
                log.warning("frame_skipped", peer="leader", seq=frame.head.seq)
                continue
            if (end := self._take(body)) is not None:
                return end

    # ------------------------------------------------------------ what needs no stream

    def _hello(self) -> tuple[GatewayHello, Head]:
        """The first frame of a session."""
        me, term = self._identity, self._leader.highest_term
        hello = GatewayHello(
            cluster=me.cluster,
            gateway=me.gateway,
            incarnation=me.incarnation,
            url=me.url,
            highest_term_seen=term,
            pid=me.pid,
            host=me.host,
        )
        return hello, Head(term=term, session=SessionId(0), seq=1)

    def _welcomed(self, answer: RouteDown) -> GatewayWelcome | str:
        """The answer to the hello, or why there is no session."""
        if isinstance(answer, SessionRefused):
            return self._refused(answer)
        if not isinstance(answer, GatewayWelcome):
            return f"{type(answer).__name__} instead of a welcome"
        self._leader.meet(answer.term, answer.leader)
        if answer.term < self._leader.highest_term:
            return f"welcome of term {answer.term} below {self._leader.highest_term}"
        return answer

    def _open_session(self, session: LeaderSession) -> None:
        for chunk in self._owner.leader_opened(session.term):
            session.send(chunk)
        self._session = session
        self.lost_at = None
        self._backoff.reset()
        self._failures = 0
        log.info("leader_session_opened", term=session.term, session=session.id)

    def _fences(self, session: LeaderSession, term: Term, frame: str) -> bool:
        """The frame's term is over: it counts for nothing, and its sender is told."""
        if term >= self._leader.highest_term:
            return False
        self.fenced += 1
        session.send(Fenced(frame=frame, seen_term=term, highest_term=self._leader.highest_term))
        return True

    def _take(self, body: RouteDown) -> str | None:
        """What the leader says, for the owner; why the session is over, if that is what it says."""
        if isinstance(body, SessionRefused):
            return self._refused(body)
        self._owner.leader_said(body)
        return None

    def _refused(self, refused: SessionRefused) -> str:
        self._leader.hint(refused.leader_address, refused.highest_term)
        return f"refused: {refused.reason.text}"


class LeaderSession:
    """One session with one leader, apart from how its frames travel."""

    def __init__(self, welcome: GatewayWelcome, timings: Timings, now: float) -> None:
        self.term = welcome.term
        self.id = welcome.session
        self._silence = Silence(timings, now)
        # The hello was frame 1 of this session, the welcome frame 1 of the other side.
        self._sent = 1
        self._received = 1

    @property
    def idle(self) -> bool:
        """Nothing waits to be sent."""
        raise NotImplementedError

    def send(self, item: Item) -> None:
        """Queue a frame, or an entry that will travel with its like."""
        raise NotImplementedError

    def _heard(self, seq: int, now: float) -> None:
        self._silence.heard(now)
        self._received = max(self._received, seq)

    def _next_head(self) -> Head:
        self._sent += 1
        return Head(term=self.term, session=self.id, seq=self._sent, ack=self._received)


class _Session(LeaderSession):
    """Over gRPC: batches, heartbeats."""

    def __init__(self, call: Any, welcome: GatewayWelcome, timings: Timings, clock: Clock) -> None:
        super().__init__(welcome, timings, clock.now())
        self._call = call
        self._timings = timings
        self._clock = clock
        self._outbox: Outbox[Item] = Outbox("route", OUTBOX_MAX)
        self._lag_ms = 0

    @property
    def idle(self) -> bool:
        return self._outbox.idle

    def send(self, item: Item) -> None:
        self._outbox.put(item)

    async def read(self) -> Any:
        frame = await read_frame(self._call)
        self._heard(frame.head.seq, self._clock.now())
        return frame

    async def write(self) -> str:
        """Send what is queued, entries of one turn as one batch. Ends only by StreamEnded."""
        while True:
            for body in batched(await self._outbox.take_all()):
                await write_frame(self._call, ROUTE_UP.encode(body, self._next_head()))

    async def beat(self, owner: RouteOwner) -> str:
        """Heartbeats up; returns when the leader is silent for too long."""
        interval = self._timings.heartbeat_interval
        while True:
            before = self._clock.now()
            requests, tokens = owner.load()
            self.send(GatewayHeartbeat(open_requests=requests, journal_tokens=tokens, loop_lag_ms=self._lag_ms))
            await self._clock.sleep(interval)
            now = self._clock.now()
            self._lag_ms = max(0, round((now - before - interval) * 1000))
            if self._outbox.overflowed:
                return f"{OUTBOX_MAX} frames behind"
            if self._silence.tick(now):
                return f"silent for {self._timings.session_silence:g} s"


def batched(items: list[Item]) -> list[RouteUp]:
    """Frames in the order of `items`, neighbours of one kind joined up to BATCH_MAX entries."""
    frames: list[RouteUp] = []
    for kind, group in groupby(items, key=type):
        make = _BATCHES.get(kind)
        if make is None:
            frames.extend(cast(Iterable[RouteUp], group))
            continue
        entries = tuple(group)
        frames.extend(make(entries[at : at + BATCH_MAX]) for at in range(0, len(entries), BATCH_MAX))
    return frames
