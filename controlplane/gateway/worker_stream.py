"""The gateway's one stream to a worker daemon: client of Serving.Serve."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc.aio
import structlog

from controlplane.gateway.leader_link import GatewayIdentity, LeaderSource
from controlplane.gateway.messages import WorkerKey
from controlplane.gateway.outbox import Outbox
from controlplane.gateway.silence import Silence
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.calls import StreamEnded, read_frame, write_frame
from controlplane.runtime.clock import Clock
from controlplane.runtime.codec import UnknownBody, WireError
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.serve import ServeDown, ServeHeartbeat, ServeHello, ServeUp, StepTokens
from controlplane.runtime.timing import Timings, channel_options
from controlplane.runtime.wire import SERVE_DOWN, SERVE_UP
from protos.perdure.v1 import serve_pb2_grpc

OUTBOX_MAX = 65536
SILENT_STREAMS_MAX = 2
"""Streams in a row that fell silent without one sign of life: the daemon answers greetings and does nothing else."""

log = structlog.get_logger()

Probe = Callable[[str, Timings], Awaitable[bool]]
"""True if two raw TCP connects to the address were both refused."""


class ServeOwner(Protocol):
    """Whom the stream serves; every method returns at once, so that reading never waits for a client."""

    def worker_up(self, worker: WorkerKey) -> None: ...

    def worker_broken(self, worker: WorkerKey, heard: float) -> None: ...

    def worker_gone(self, worker: WorkerKey, reason: Reason) -> None: ...

    def worker_said(self, worker: WorkerKey, body: ServeDown) -> None: ...


class WorkerStream:
    """Keeps a stream to one worker up, and says when it is up, broken, or refused for good."""

    def __init__(
        self,
        worker: WorkerKey,
        node: str,
        identity: GatewayIdentity,
        leader: LeaderSource,
        timings: Timings,
        clock: Clock,
        owner: ServeOwner,
        probe: Probe,
    ) -> None:
        self.worker = worker
        self.node = node
        self._identity = identity
        self._leader = leader
        self._timings = timings
        self._clock = clock
        self._owner = owner
        self._probe = probe
        self._outbox: Outbox[ServeUp] | None = None
        self._silence = Silence(timings, clock.now())
        self._silent_streams = 0

    @property
    def up(self) -> bool:
        return self._outbox is not None

    @property
    def idle(self) -> bool:
        """Nothing waits to be sent."""
        return self._outbox is None or self._outbox.idle

    @property
    def heard_at(self) -> float:
        """When the worker last said anything; monotonic seconds."""
        return self._silence.heard_at

    def send(self, body: ServeUp) -> None:
        """Queue a frame on the live stream; without one it is lost, and the next Sync makes it good."""
        if self._outbox is not None:
            self._outbox.put(body)

    async def run(self) -> None:
        """Eternal: one stream after the other."""
        backoff = Backoff(self._timings, random.Random())
        while True:
            failure = await self._stream(backoff)
            log.info("worker_stream_ended", worker=self.worker, node=self.node, reason=failure)
            self._outbox = None
            self._owner.worker_broken(self.worker, self._silence.heard_at)
            if (reason := await self._verdict()) is not None:
                self._owner.worker_gone(self.worker, reason)
            await self._clock.sleep(backoff.next())

    async def _verdict(self) -> Reason | None:
        """Why the worker is lost for its sequences, None while it may come back."""
        who = f"worker {self.node} at {self.worker}"
        if self._silent_streams >= SILENT_STREAMS_MAX:
            return Reason(kind=ReasonKind.SESSION_SILENT, text=f"{who} greets and then falls silent")
        if await self._probe(self.worker, self._timings):
            return Reason(kind=ReasonKind.CONNECTION_REFUSED, text=f"{who} refuses connections")
        return None

    async def _stream(self, backoff: Backoff) -> str:
        """One stream from hello to its end; returns why it ended."""
        # A channel of its own each time: an old one would sit out its backoff.
        async with grpc.aio.insecure_channel(self.worker, options=channel_options(self._timings)) as channel:
            call = serve_pb2_grpc.ServingStub(channel).Serve()
            try:
                return await self._greet(call) or await self._hold(call, backoff)
            except StreamEnded as error:
                return str(error)
            except WireError as error:
                log.warning("frame_refused", peer=self.worker, error=str(error))
                return str(error)
            finally:
                call.cancel()

    async def _greet(self, call: Any) -> str | None:
        me, addresses = self._identity, self._leader.addresses
        hello = ServeHello(
            cluster=me.cluster,
            name=me.gateway,
            incarnation=me.incarnation,
            highest_term_seen=self._leader.highest_term,
            leader_address=addresses[0] if addresses else "",
            heartbeat_interval_ms=round(self._timings.heartbeat_interval * 1000),
        )
        try:
            async with asyncio.timeout(self._timings.session_silence):
                await write_frame(call, SERVE_UP.encode(hello))
                answer = SERVE_DOWN.decode(await read_frame(call))
        except TimeoutError:
            return "no hello in time"
        if not isinstance(answer, ServeHello):
            return f"{type(answer).__name__} instead of a hello"
        if answer.cluster != me.cluster:
            return f"the worker belongs to cluster {answer.cluster}"
        self._leader.hint(answer.leader_address, answer.highest_term_seen)
        return None

    async def _hold(self, call: Any, backoff: Backoff) -> str:
        self._silence = Silence(self._timings, self._clock.now())
        outbox = self._outbox = Outbox[ServeUp](f"serve {self.worker}", OUTBOX_MAX)
        backoff.reset()
        log.info("worker_stream_opened", worker=self.worker, node=self.node)
        self._owner.worker_up(self.worker)
        tasks = [
            asyncio.create_task(self._write(call, outbox), name=f"serve_write {self.worker}"),
            asyncio.create_task(self._read(call), name=f"serve_read {self.worker}"),
            asyncio.create_task(self._judge(outbox), name=f"serve_judge {self.worker}"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, call: Any, outbox: Outbox[ServeUp]) -> str:
        while True:
            for body in await outbox.take_all():
                await write_frame(call, SERVE_UP.encode(body))

    async def _read(self, call: Any) -> str:
        owner, worker, clock = self._owner, self.worker, self._clock
        while True:
            frame = await read_frame(call)
            self._silence.heard(clock.now())
            try:
                body = SERVE_DOWN.decode(frame)
            except UnknownBody:
                log.warning("frame_skipped", peer=worker)
                continue
            if isinstance(body, StepTokens | ServeHeartbeat):
                self._silent_streams = 0
            if isinstance(body, ServeHeartbeat):
                self._leader.hint(body.leader_address, body.highest_term_seen)
            owner.worker_said(worker, body)

    async def _judge(self, outbox: Outbox[ServeUp]) -> str:
        """Returns when the worker has been silent, or has not read, for too long."""
        while True:
            await self._clock.sleep(self._timings.heartbeat_interval)
            if outbox.overflowed:
                return f"{outbox.name}: {OUTBOX_MAX} frames behind"
            if self._silence.tick(self._clock.now()):
                self._silent_streams += 1
                return f"silent for {self._timings.session_silence:g} s"
