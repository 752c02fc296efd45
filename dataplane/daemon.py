"""The worker daemon: the actor shell around dataplane.core. It performs effects and reports every outcome as an event.

Everything runs on one event loop, the lease keeper too: a lease must not outlive a hung loop. Neither etcd's absence
nor a leader's ends the daemon, for however long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from random import Random

import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]

from controlplane.runtime.backoff import Backoff
from controlplane.runtime.clock import Clock
from controlplane.runtime.errors import Retryable, invalid
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.lease import LeaseEvent, LeaseEventKind, LeaseKeeper
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.serve import StepTokens
from controlplane.runtime.race import race
from controlplane.runtime.records import NodeRecord
from controlplane.runtime.registration import Registration
from controlplane.runtime.timing import Timings, server_options, timings_from_spec
from dataplane.bootstrap import await_cluster, await_devices, identify
from dataplane.config import WorkerConfig, check_port_free
from dataplane.coordinator_link import CoordinatorLink
from dataplane.core.messages import (
    CloseGateway,
    Depart,
    DevicesRead,
    Effect,
    Event,
    HintLeader,
    KillRank,
    LeaseGone,
    LeaseGranted,
    LeaveLeader,
    MarkEpochsOver,
    Recorded,
    RenewLease,
    SendGateway,
    SendLeader,
    SendRank,
    SpawnRank,
    StopAsked,
    Tick,
)
from dataplane.core.state import Identity, WorkerState
from dataplane.core.step import begin, step
from dataplane.devices import gpus
from dataplane.gateway_link import ServingServicer
from dataplane.metrics import WorkerMetrics
from dataplane.nvml import watch
from dataplane.rank_pool import PoolSettings, RankPool
from protos.perdure.v1 import serve_pb2_grpc

log = structlog.get_logger()

TICKS_PER_HEARTBEAT = 10
HEARTBEATS_PER_READING = 4
"""How often GPUs are asked how they are."""


class WorkerDaemon:
    """One node's daemon. `run` is its whole life; `stop` may be called from a signal handler."""

    def __init__(self, config: WorkerConfig, pool: PoolSettings, clock: Clock) -> None:
        self._config = config
        self._pool_settings = pool
        self._clock = clock
        self._random = Random()
        self._stop_asked: Reason | None = None
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._shell: WorkerShell | None = None

    def stop(self, reason: Reason) -> None:
        """The first time: drain, then go. The second time: go at once."""
        if self._stop_asked is not None:
            self._hurried.set()
        self._stop_asked = reason
        self._stopping.set()
        if self._shell is not None:
            self._shell.post(StopAsked(reason))

    async def run(self) -> None:
        """Until stopped. Raises Rejected or EtcdDenied for what makes a start impossible, naming it, and whatever broke
        the daemon later."""
        check_port_free(self._config.host, self._config.port, "--port")
        if self._config.metrics_port is not None:
            check_port_free(self._config.host, self._config.metrics_port, "--metrics-port")
        # A daemon that serves nothing yet has nothing to drain.
        await race(self._stopping.wait(), self._begin())
        if self._shell is None:
            return
        try:
            await race(self._hurried.wait(), self._shell.run())
        finally:
            await self._shell.end()

    async def _begin(self) -> None:
        cluster = await await_cluster(self._config, self._clock, self._random)
        timings = timings_from_spec(cluster.timing)
        await await_devices(self._config, cluster.cluster, timings, self._clock)
        shell = WorkerShell(self._config, timings, self._clock, self._random)
        try:
            port = await shell.listen()
            await shell.join(identify(self._config, cluster, port), self._pool_settings)
        except BaseException:
            await shell.end()
            raise
        self._shell = shell


class WorkerShell:
    """The daemon once it knows its cluster: links, pool, lease, and the core between them."""

    def __init__(self, config: WorkerConfig, timings: Timings, clock: Clock, random: Random) -> None:
        self._config = config
        self._timings = timings
        self._clock = clock
        self._random = random
        self._etcd = EtcdClient(config.etcd, timings, clock)
        self._leader = LeaderWatch(self._etcd, config.keys, timings, clock, random)
        self._coordinator = CoordinatorLink(self._leader, timings, clock, random, self.post)
        self._gateways = ServingServicer(timings, self.post)
        self._health = health_aio.HealthServicer()
        self._server = grpc.aio.server(options=server_options(timings))
        self._metrics = WorkerMetrics(config.node)
        self._inbox: deque[Event] = deque()
        self._handling = False
        self._departing = asyncio.Event()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._state: WorkerState | None = None
        self._lease: LeaseKeeper | None = None
        self._pool: RankPool | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------ life

    async def listen(self) -> int:
        """Bind the gRPC port, before anyone is told of it. Raises Rejected if it is taken."""
        address = f"{self._config.host}:{self._config.port}"
        serve_pb2_grpc.add_ServingServicer_to_server(self._gateways, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise invalid(f"--port {address} cannot be listened on") from error
        if self._config.metrics_port is not None:
            self._metrics.serve(self._config.host, self._config.metrics_port)
        return port

    async def join(self, identity: Identity, pool: PoolSettings) -> None:
        """Begin the core and register the node. Raises NameTaken, or Rejected if etcd grants no lease this short."""
        self._state = begin(identity, self._timings, self._clock.now())
        self._pool = RankPool(pool, identity.cluster, self._timings, self._clock, self.post)
        await self._pool.start()
        self._spawn("pool", self._pool.run())
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._spawn("tick", self._tick())
        self._watch_devices()
        await self._register(identity)
        for name, eternal in (("leader", self._leader.run()), ("coordinator", self._coordinator.run())):
            self._spawn(name, eternal)
        log.info("worker_started", node=identity.node, address=identity.serve_address, pid=identity.pid)

    async def run(self) -> None:
        """Until the core departs. Raises what broke the daemon."""
        await race(self._departing.wait(), self._watch_over())

    async def end(self) -> None:
        """Streams first, then the session, the lease, and the listener last: a refused connection proves a death."""
        reason = Reason(kind=ReasonKind.DRAINING, text="the worker leaves", node=self._config.node)
        try:
            await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            await self._gateways.leave(reason)
            await self._coordinator.end()
        finally:
            # Also where the leave itself is cut short: nobody else ends them.
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._pool is not None:
            self._pool.stop()
        if self._lease is not None:
            await self._lease.close()
        await self._server.stop(self._timings.heartbeat_interval)
        await self._etcd.close()
        log.info("worker_stopped")

    async def _register(self, identity: Identity) -> None:
        def record(lease: int) -> NodeRecord:
            return NodeRecord(
                node=identity.node,
                incarnation=identity.incarnation,
                serve_address=identity.serve_address,
                host=identity.host,
                pid=identity.pid,
                boot_id=identity.boot_id,
                lease_id=lease,
            )

        registration = Registration(self._etcd, self._config.keys.node(identity.node), record, self._timings)
        self._lease = LeaseKeeper(
            self._etcd, registration, self._timings, self._clock, self._random, self._lease_changed
        )
        backoff = Backoff(self._timings, self._random)
        while True:
            try:
                await self._lease.start()
                break
            except Retryable as error:
                log.info("registration_awaited", reason=error.reason.text)
                await self._clock.sleep(backoff.next())
        self.post(LeaseGranted(self._lease.lease))
        self._spawn("lease", self._lease.run())

    def _spawn(self, name: str, eternal: object) -> None:
        assert asyncio.iscoroutine(eternal)
        self._tasks.append(asyncio.create_task(eternal, name=name))

    async def _watch_over(self) -> None:
        """Returns never: raises what ended a task that should be eternal, or broke the core."""
        done, _ = await asyncio.wait([*self._tasks, self._broken], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
            raise AssertionError(f"{task} came to its end")

    async def _tick(self) -> None:
        interval = self._timings.heartbeat_interval / TICKS_PER_HEARTBEAT
        assert self._pool is not None
        due = self._clock.now()
        while True:
            lag = self._clock.now() - due
            self.post(Tick(self._pool.samples(), max(0.0, lag)))
            if self._state is not None:
                self._metrics.update(self._state)
            due = self._clock.now() + interval
            await self._clock.sleep(interval)

    def _watch_devices(self) -> None:
        """Have the driver asked how its GPUs are; without one there is nobody to ask."""
        loop = asyncio.get_running_loop()
        watched = gpus(self._config.devices)
        if watched:
            interval = self._timings.heartbeat_interval * HEARTBEATS_PER_READING
            watch(watched, interval, lambda readings: loop.call_soon_threadsafe(self.post, DevicesRead(readings)))

    def _lease_changed(self, event: LeaseEvent) -> None:
        match event.kind:
            case LeaseEventKind.GONE:
                self.post(LeaseGone())
            case LeaseEventKind.RELET:
                self.post(LeaseGranted(event.lease))
            case _:
                return

    # ------------------------------------------------------------ the core

    def post(self, event: Event) -> None:
        """Hand the core an event and do what it says. An event that arises meanwhile follows it."""
        self._inbox.append(event)
        if self._handling or self._state is None or self._broken.done():
            return
        self._handling = True
        try:
            while self._inbox:
                for effect in step(self._state, self._inbox.popleft(), self._clock.now()):
                    self._perform(effect)
        except Exception as error:
            # Callers are event loop callbacks that would only log it: a broken invariant ends the daemon.
            self._broken.set_exception(error)
            raise
        finally:
            self._handling = False

    def _perform(self, effect: Effect) -> None:
        assert self._pool is not None
        match effect:
            case SendGateway(stream, body):
                if isinstance(body, StepTokens):
                    self._metrics.sent_tokens(len(body.tokens) // 4)
                self._gateways.send(stream, body)
            case SendRank(device, frame):
                self._pool.send(device, frame)
            case SendLeader(link, body):
                self._coordinator.send(link, body)
            case LeaveLeader(link, _, highest_term, address):
                self._coordinator.leave(link, highest_term, address)
            case HintLeader(address, term):
                self._leader.hint(address, term)
            case CloseGateway(stream, reason):
                self._gateways.close(stream, reason)
            case SpawnRank(device):
                self._pool.spawn(device)
            case MarkEpochsOver(device, epoch):
                self._pool.mark_epochs_over(device, epoch)
            case KillRank(device, pid, reason):
                self._pool.kill(device, pid, reason)
            case RenewLease():
                if self._lease is not None:
                    self._lease.relet()
            case Depart():
                self._departing.set()
            case Recorded():
                self._record(effect)

    def _record(self, record: Recorded) -> None:
        self._metrics.happened(record.name)
        named = {"replica": record.replica, "epoch": record.epoch, "request": record.request}
        fields = {key: value for key, value in named.items() if value}
        if record.reason is not None:
            fields |= {"reason": record.reason.text, "kind": record.reason.kind.name.lower()}
        log.info(record.name, **fields, **record.details)
