"""The gateway's links as models: its session with the leader, and its streams to workers. The real ones, as they are,
run in `tools.sim.shells`."""

from __future__ import annotations

import contextlib
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

from controlplane.gateway.leader_link import Item, batched
from controlplane.gateway.messages import WorkerKey
from controlplane.gateway.silence import Silence
from controlplane.gateway.worker_stream import SILENT_STREAMS_MAX
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.ids import NodeId, SessionId
from controlplane.runtime.messages.common import Head, Reason, ReasonKind
from controlplane.runtime.messages.route import (
    EndEntry,
    FirstToken,
    GatewayHeartbeat,
    GatewayHello,
    GatewayWelcome,
    Inventory,
    JournalInfo,
    LeaderHeartbeat,
    RouteEntry,
)
from controlplane.runtime.messages.serve import ServeHeartbeat, ServeHello, ServeUp, StepTokens
from controlplane.runtime.messages.session import Fenced, SessionRefused
from tools.sim.probing import refused_twice
from tools.sim.process import Task
from tools.sim.streams import Reader, StreamEnded, dial

if TYPE_CHECKING:
    from tools.sim.gateway import SimGateway

# ---------------------------------------------------------------- the leader


class _Session:
    """One stream to one leader: heads, batches, heartbeats."""

    def __init__(self, gateway: SimGateway, reader: Reader, welcome: GatewayWelcome) -> None:
        self.term, self.id = welcome.term, welcome.session
        self.silence = Silence(gateway.timings, gateway.process.now())
        self._process = gateway.process
        self._reader = reader
        self._outbox: deque[Item] = deque()
        self._sent = 1
        self._received = 1

    def send(self, item: Item) -> None:
        if not self._outbox:
            self._process.soon(self._write)
        self._outbox.append(item)

    async def read(self) -> tuple[Head, Any]:
        head, body = await self._reader.read()
        self.silence.heard(self._process.now())
        self._received = max(self._received, head.seq)
        return head, body

    def close(self) -> None:
        self._reader.side.close()

    def _write(self) -> None:
        items = list(self._outbox)
        self._outbox.clear()
        for body in batched(items):
            self._sent += 1
            head = Head(term=self.term, session=self.id, seq=self._sent, ack=self._received)
            self._reader.side.send((head, body))


class SimLeaderLink:
    """Faithful to LeaderLink: finds the leader, keeps one session with it, and takes it up again with its successor."""

    def __init__(self, gateway: SimGateway) -> None:
        self._gateway = gateway
        self._process = gateway.process
        self._leader = gateway.leader
        self._timings = gateway.timings
        self._session: _Session | None = None
        self._backoff = Backoff(gateway.timings, Random(gateway.process.kernel.random.getrandbits(32)))
        self._failures = 0

    def ask(self, entry: RouteEntry) -> None:
        if self._session is not None:
            self._session.send(entry)

    def first_token(self, token: FirstToken) -> None:
        if self._session is not None:
            self._session.send(token)

    def end(self, entry: EndEntry) -> None:
        if self._session is not None:
            self._session.send(entry)

    def adopted(self, journal: JournalInfo) -> None:
        if self._session is not None:
            self._session.send(Inventory(journals=(journal,), last=False))

    async def run(self) -> None:
        while True:
            addresses = self._leader.addresses
            if not addresses:
                await self._leader.changed()
                continue
            address = addresses[self._failures % len(addresses)]
            self._failures += 1
            newer = self._process.spawn(self._newer_leader(address))
            session = self._process.spawn(self._converse(address))
            await self._process.first(newer, session)
            newer.cancel()
            session.cancel()
            self._close_session()
            await self._process.sleep(self._backoff.next())

    async def _newer_leader(self, address: str) -> None:
        while True:
            await self._leader.changed()
            if self._session is not None and self._leader.highest_term > self._session.term:
                return
            if self._leader.addresses and self._leader.addresses[0] != address:
                return

    def leave(self) -> None:
        if self._session is not None:
            self._session.close()

    def _close_session(self) -> None:
        if self._session is not None:
            self._session = None
            self._gateway.requests.leader_lost()

    async def _converse(self, address: str) -> None:
        try:
            side = await dial(self._process, self._gateway.network, address, "route", self._timings.stage)
        except StreamEnded:
            return
        reader = Reader(side)
        try:
            welcome = await self._greet(reader)
            if welcome is not None:
                await self._hold(_Session(self._gateway, reader, welcome))
        except StreamEnded:
            pass
        finally:
            side.close()

    async def _greet(self, reader: Reader) -> GatewayWelcome | None:
        me, term = self._gateway.identity, self._leader.highest_term
        hello = GatewayHello(
            cluster=me.cluster,
            gateway=me.gateway,
            incarnation=me.incarnation,
            url=me.url,
            highest_term_seen=term,
            pid=me.pid,
            host=me.host,
        )
        reader.side.send((Head(term=term, session=SessionId(0), seq=1), hello))
        if await self._process.first(reader.pending(), timeout=self._timings.session_silence) < 0:
            return None
        _, answer = await reader.read()
        if isinstance(answer, SessionRefused):
            self._leader.hint(answer.leader_address, answer.highest_term)
            return None
        if not isinstance(answer, GatewayWelcome):
            return None
        self._leader.meet(answer.term, answer.leader)
        return answer if answer.term >= self._leader.highest_term else None

    async def _hold(self, session: _Session) -> None:
        for chunk in self._gateway.requests.leader_opened(session.term):
            session.send(chunk)
        self._session = session
        self._backoff.reset()
        self._failures = 0
        beat = self._process.spawn(self._beat(session))
        read = self._process.spawn(self._read(session))
        try:
            await self._process.first(beat, read)
        finally:
            beat.cancel()
            read.cancel()

    async def _beat(self, session: _Session) -> None:
        while True:
            requests, tokens = self._gateway.requests.load()
            session.send(GatewayHeartbeat(open_requests=requests, journal_tokens=tokens, loop_lag_ms=0))
            await self._process.sleep(self._timings.heartbeat_interval)
            if session.silence.tick(self._process.now()):
                return

    async def _read(self, session: _Session) -> None:
        try:
            while True:
                head, body = await session.read()
                if head.term < self._leader.highest_term:
                    highest = self._leader.highest_term
                    session.send(Fenced(frame=type(body).__name__, seen_term=head.term, highest_term=highest))
                elif isinstance(body, SessionRefused):
                    self._leader.hint(body.leader_address, body.highest_term)
                    return
                elif not isinstance(body, LeaderHeartbeat):
                    self._gateway.requests.leader_said(body)
        except StreamEnded:
            return


# ---------------------------------------------------------------- workers


class SimWorkerStreams:
    """One stream a worker, while it is wanted."""

    def __init__(self, gateway: SimGateway) -> None:
        self._gateway = gateway
        self._running: dict[WorkerKey, tuple[SimWorkerStream, Task]] = {}

    def connect(self, worker: WorkerKey, node: NodeId) -> None:
        assert worker not in self._running
        stream = SimWorkerStream(self._gateway, worker, node)
        self._running[worker] = stream, self._gateway.process.spawn(stream.run())

    def drop(self, worker: WorkerKey) -> None:
        stream, task = self._running.pop(worker)
        stream.end()
        task.cancel()

    def send(self, worker: WorkerKey, body: ServeUp) -> None:
        self._running[worker][0].send(body)

    def leave(self) -> None:
        for stream, _ in self._running.values():
            stream.end()


class SimWorkerStream:
    """Faithful to WorkerStream: keeps a stream up, and says when it is up, broken, or refused for good."""

    def __init__(self, gateway: SimGateway, worker: WorkerKey, node: NodeId) -> None:
        self._gateway = gateway
        self._process = gateway.process
        self._worker = worker
        self._node = node
        self._timings = gateway.timings
        self._reader: Reader | None = None
        self._silence = Silence(gateway.timings, gateway.process.now())
        self._silent_streams = 0
        self._tasks: list[Task] = []

    def send(self, body: ServeUp) -> None:
        if self._reader is not None:
            self._reader.side.send(body)

    def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._reader is not None:
            self._reader.side.close()
            self._reader = None

    async def run(self) -> None:
        backoff = Backoff(self._timings, Random(self._process.kernel.random.getrandbits(32)))
        while True:
            with contextlib.suppress(StreamEnded):
                await self._stream(backoff)
            self.end()
            self._gateway.requests.worker_broken(self._worker, self._silence.heard_at)
            if (reason := await self._verdict()) is not None:
                self._gateway.requests.worker_gone(self._worker, reason)
            await self._process.sleep(backoff.next())

    async def _verdict(self) -> Reason | None:
        if self._silent_streams >= SILENT_STREAMS_MAX:
            return Reason(kind=ReasonKind.SESSION_SILENT, text=f"{self._node} greets and then falls silent")
        if await refused_twice(self._process, self._gateway.network, self._worker, self._timings):
            return Reason(kind=ReasonKind.CONNECTION_REFUSED, text=f"{self._node} refuses connections")
        return None

    async def _stream(self, backoff: Backoff) -> None:
        timeout = self._timings.session_silence
        side = await dial(self._process, self._gateway.network, self._worker, "serve", timeout)
        reader = Reader(side)
        try:
            await self._greet(reader)
            self._silence = Silence(self._timings, self._process.now())
            self._reader = reader
            backoff.reset()
            self._gateway.requests.worker_up(self._worker)
            self._tasks = [self._process.spawn(self._read(reader)), self._process.spawn(self._judge())]
            await self._process.first(*self._tasks)
        finally:
            side.close()

    async def _greet(self, reader: Reader) -> None:
        me, leader = self._gateway.identity, self._gateway.leader
        reader.side.send(
            ServeHello(
                cluster=me.cluster,
                name=me.gateway,
                incarnation=me.incarnation,
                highest_term_seen=leader.highest_term,
                leader_address=leader.addresses[0] if leader.addresses else "",
                heartbeat_interval_ms=round(self._timings.heartbeat_interval * 1000),
            )
        )
        if await self._process.first(reader.pending(), timeout=self._timings.session_silence) < 0:
            raise StreamEnded("no hello in time")
        answer = await reader.read()
        if not isinstance(answer, ServeHello) or answer.cluster != me.cluster:
            raise StreamEnded("no hello of this cluster")
        leader.hint(answer.leader_address, answer.highest_term_seen)

    async def _read(self, reader: Reader) -> None:
        try:
            while True:
                body = await reader.read()
                self._silence.heard(self._process.now())
                if isinstance(body, StepTokens | ServeHeartbeat):
                    self._silent_streams = 0
                if isinstance(body, ServeHeartbeat):
                    self._gateway.leader.hint(body.leader_address, body.highest_term_seen)
                self._gateway.requests.worker_said(self._worker, body)
        except StreamEnded:
            return

    async def _judge(self) -> None:
        while True:
            await self._process.sleep(self._timings.heartbeat_interval)
            if self._silence.tick(self._process.now()):
                self._silent_streams += 1
                return
