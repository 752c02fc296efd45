"""The gateway: holds client connections, keeps their journals, and has no other state worth keeping."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry

from controlplane.gateway.generation import Generator
from controlplane.gateway.http import HttpServer
from controlplane.gateway.http_generate import GenerateHandlers
from controlplane.gateway.inference import add_inference
from controlplane.gateway.leader_link import GatewayIdentity, LeaderLink, LeaderSource
from controlplane.gateway.limits import GatewayLimits
from controlplane.gateway.messages import WorkerKey
from controlplane.gateway.metrics import GatewayMetrics
from controlplane.gateway.models import Catalogue
from controlplane.gateway.readiness import readiness
from controlplane.gateway.requests import Requests
from controlplane.gateway.state import GatewayState
from controlplane.gateway.tokenizer import TokenizerPool
from controlplane.gateway.worker_stream import WorkerStream
from controlplane.gateway.worker_streams import WorkerStreams
from controlplane.runtime.actor import supervise
from controlplane.runtime.clock import Clock
from controlplane.runtime.ids import ClusterId, GatewayId, Incarnation, NodeId
from controlplane.runtime.probe import refused_twice
from controlplane.runtime.timing import Timings

if TYPE_CHECKING:
    import grpc.aio

log = structlog.get_logger()


class Gateway:
    """HTTP and gRPC edge, journals, the leader's link and the workers' streams, on one loop.

    `start` binds and begins; `wait` ends only when a part failed for good; `stop` lets open streams end.
    """

    def __init__(
        self,
        name: str,
        incarnation: Incarnation,
        cluster: ClusterId,
        timings: Timings,
        leader: LeaderSource,
        http_host: str,
        http_port: int,
        limits: GatewayLimits,
        clock: Clock,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._name = GatewayId(name)
        self._incarnation = incarnation
        self._cluster = cluster
        self._timings = timings
        self._leader = leader
        self._limits = limits
        self._clock = clock
        self._metrics = GatewayMetrics(registry or CollectorRegistry())
        self._state = GatewayState(timings=timings, limits=limits.journals)
        self._tasks = asyncio.TaskGroup()
        self._pool = TokenizerPool(retry_ms=round(timings.stage * 1000))
        self._catalogue = Catalogue(self._pool, self._tasks)
        self._requests = Requests(self._state, clock, self._metrics, self._see_rows)
        self._generator = Generator(self._requests, self._catalogue, self._pool, limits, self._metrics, clock)
        self._http = HttpServer(
            http_host,
            http_port,
            GenerateHandlers(self._generator),
            self._catalogue,
            self._metrics,
            self._refresh_metrics,
            self.ready,
            limits.body_bytes_max,
        )
        self._workers = WorkerStreams(self._make_stream, self._tasks, clock)
        self._link: LeaderLink | None = None
        self._identity: GatewayIdentity | None = None
        self._main: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()

    @property
    def url(self) -> str:
        """Base URL of the HTTP API; its port is known after `start`."""
        return self._http.url

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Serve Inference there."""
        add_inference(server, self._generator)

    async def start(self) -> None:
        """Bind the HTTP port and look for the leader. Raises Rejected if the port is taken."""
        await self._http.start()
        self._identity = GatewayIdentity(
            self._cluster, self._name, self._incarnation, self.url, os.getpid(), socket.gethostname()
        )
        self._link = LeaderLink(self._identity, self._leader, self._timings, self._clock, self._requests)
        self._requests.attach(self._link, self._workers)
        self._main = asyncio.create_task(self._run(self._link), name=f"gateway {self._name}")

    async def expect(self, model_paths: Iterable[str]) -> None:
        """After `start`: load what serving these models takes. Python stands still for a second or so meanwhile."""
        await self._catalogue.expect(model_paths)

    async def wait(self) -> None:
        """Returns after `stop`; raises what ended the gateway otherwise."""
        assert self._main is not None, "start first"
        await asyncio.shield(self._main)

    async def stop(self) -> None:
        """Accept nothing new, let open streams end until the grace is over, leave the rest to other gateways, end."""
        await self._http.refuse_new()
        await self._until(lambda: self._requests.open_requests == 0, self._limits.stop_grace_s)
        self._requests.release()
        await self._http.stop()
        await self._until(self._is_idle, self._timings.heartbeat_interval)
        self._ending.set()
        if self._main is not None:
            await self._main
        self._pool.close()
        log.info("gateway_stopped", gateway=self._name)

    def ready(self) -> tuple[bool, str]:
        """Whether a request can be served now, and why (not)."""
        now = self._clock.now()
        lost_at = self._link.lost_at if self._link is not None else now
        leaderless_for = now - lost_at if lost_at is not None else 0.0
        if not self._catalogue.told:
            return False, "no coordinator has told yet what is served"
        return readiness(self._state, now, leaderless_for=leaderless_for, heard_at=self._heard_at)

    async def _run(self, link: LeaderLink) -> None:
        async with self._tasks as tasks:
            eternal = [
                tasks.create_task(supervise("leader_link", link.run, self._clock), name="leader_link"),
                tasks.create_task(supervise("gateway_ticks", self._tick, self._clock), name="gateway_ticks"),
            ]
            await self._ending.wait()
            for task in eternal:
                task.cancel()
            self._workers.drop_all()

    async def _tick(self) -> None:
        while True:
            await self._clock.sleep(self._timings.reconnect_min)
            self._requests.tick()

    async def _until(self, holds: Callable[[], bool], limit_s: float) -> None:
        deadline = self._clock.now() + limit_s
        while not holds() and self._clock.now() < deadline:
            await self._clock.sleep(self._timings.reconnect_min)

    def _is_idle(self) -> bool:
        return self._workers.idle and (self._link is None or self._link.idle)

    def _make_stream(self, worker: WorkerKey, node: NodeId) -> WorkerStream:
        assert self._identity is not None
        return WorkerStream(
            worker, node, self._identity, self._leader, self._timings, self._clock, self._requests, refused_twice
        )

    def _see_rows(self) -> None:
        self._catalogue.see(self._state.rows.values(), self._clock.wall_ms() // 1000)

    def _heard_at(self, worker: WorkerKey) -> float | None:
        stream = self._workers.stream(worker)
        return stream.heard_at if stream is not None and stream.up else None

    def _refresh_metrics(self) -> None:
        """Set what is looked up, not counted."""
        self._metrics.settle()
        for phase, count in self._requests.phases().items():
            self._metrics.journals.labels(phase.name.lower()).set(count)
        self._metrics.journal_tokens.set(self._state.journal_tokens)
        up, known = self._workers.count_up()
        self._metrics.workers.labels("up").set(up)
        self._metrics.workers.labels("down").set(known - up)
        self._metrics.leader.set((self._link.term or 0) if self._link is not None else 0)
