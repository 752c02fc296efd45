"""The gateway's links: the real one to the leader over the modelled network, and its streams to workers as models. The
real ones, as they are, run in `tools.sim.shells`."""

from __future__ import annotations

import contextlib
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

from controlplane.gateway.leader_link import Item, LeaderLink, LeaderSession, RouteOwner, batched
from controlplane.gateway.messages import WorkerKey
from controlplane.gateway.silence import Silence
from controlplane.gateway.worker_stream import SILENT_STREAMS_MAX
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.ids import NodeId
from controlplane.runtime.messages.common import Head, Reason, ReasonKind
from controlplane.runtime.messages.route import GatewayHeartbeat, GatewayWelcome
from controlplane.runtime.messages.serve import ServeHeartbeat, ServeHello, ServeUp, StepTokens
from controlplane.runtime.timing import Timings
from tools.sim.probing import refused_twice
from tools.sim.process import Process, Task
from tools.sim.streams import Reader, StreamEnded, dial

if TYPE_CHECKING:
    from tools.sim.gateway import SimGateway

# ---------------------------------------------------------------- the leader


class _Session(LeaderSession):
    """Over the modelled network."""

    def __init__(self, process: Process, timings: Timings, reader: Reader, welcome: GatewayWelcome) -> None:
        super().__init__(welcome, timings, process.now())
        self._process = process
        self._reader = reader
        self._outbox: deque[Item] = deque()

    @property
    def idle(self) -> bool:
        return not self._outbox

    def send(self, item: Item) -> None:
        if not self._outbox:
            self._process.soon(self._write)
        self._outbox.append(item)

    async def read(self) -> tuple[Head, Any]:
        head, body = await self._reader.read()
        self._heard(head.seq, self._process.now())
        return head, body

    async def beat(self, owner: RouteOwner, interval: float) -> None:
        """Until the leader is silent for too long."""
        silent = False
        while not silent:
            requests, tokens = owner.load()
            self.send(GatewayHeartbeat(open_requests=requests, journal_tokens=tokens, loop_lag_ms=0))
            await self._process.sleep(interval)
            silent = self._silence.tick(self._process.now())

    def close(self) -> None:
        self._reader.side.close()

    def _write(self) -> None:
        items = list(self._outbox)
        self._outbox.clear()
        for body in batched(items):
            self._reader.side.send((self._next_head(), body))


class SimLeaderLink(LeaderLink):
    """The real one; its streams go over the modelled network, its waits are the simulated process's."""

    def __init__(self, gateway: SimGateway) -> None:
        process = gateway.process
        super().__init__(gateway.identity, gateway.leader, gateway.timings, process, gateway.requests)
        self._network = gateway.network
        self._process = process
        self._backoff = Backoff(gateway.timings, Random(process.kernel.random.getrandbits(32)))

    def leave(self) -> None:
        if isinstance(self._session, _Session):
            self._session.close()

    async def _attend(self, address: str) -> str:
        newer = self._process.spawn(self._newer_leader(address))
        session = self._process.spawn(self._converse(address))
        await self._process.first(newer, session)
        newer.cancel()
        session.cancel()
        self._close_session()
        return session.value if session.done else "another leader is known"

    async def _converse(self, address: str) -> str:
        try:
            side = await dial(self._process, self._network, address, "route", self._timings.stage)
        except StreamEnded as error:
            return str(error)
        reader = Reader(side)
        try:
            welcome = await self._ask_welcome(reader)
            if isinstance(welcome, str):
                return welcome
            return await self._keep(_Session(self._process, self._timings, reader, welcome))
        except StreamEnded as error:
            return str(error)
        finally:
            side.close()

    async def _ask_welcome(self, reader: Reader) -> GatewayWelcome | str:
        hello, head = self._hello()
        reader.side.send((head, hello))
        if await self._process.first(reader.pending(), timeout=self._timings.session_silence) < 0:
            return "no welcome in time"
        _, answer = await reader.read()
        return self._welcomed(answer)

    async def _keep(self, session: _Session) -> str:
        self._open_session(session)
        beat = self._process.spawn(session.beat(self._owner, self._timings.heartbeat_interval))
        read = self._process.spawn(self._hear(session))
        try:
            await self._process.first(beat, read)
            return read.value if read.done else f"silent for {self._timings.session_silence:g} s"
        finally:
            beat.cancel()
            read.cancel()

    async def _hear(self, session: _Session) -> str:
        try:
            while True:
                head, body = await session.read()
                if self._fences(session, head.term, type(body).__name__):
                    continue
                if (end := self._take(body)) is not None:
                    return end
        except StreamEnded as error:
            return str(error)


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
