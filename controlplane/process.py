"""One control-plane process: a candidate coordinator, the admin service and a gateway, on one event loop.

The port is bound before anything is registered, so that an address in etcd always answers. On the way out streams end
first, then leadership and lease are given back, and the listener closes last (PROTOCOL §4, duty 8).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

import grpc.aio
import structlog
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from controlplane.admin import AdminServicer
from controlplane.coordinator import Coordinator, Identity
from controlplane.core.state import Limits
from controlplane.election import Election
from controlplane.event_log import EventLog
from controlplane.gateway.gateway import Gateway
from controlplane.gateway.limits import GatewayLimits
from controlplane.leader_stream import SessionStreams
from controlplane.metrics import CoordinatorMetrics
from controlplane.route_link import RoutingServicer
from controlplane.runtime import host
from controlplane.runtime.actor import supervise
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.clock import Clock, SystemClock
from controlplane.runtime.errors import Retryable, invalid
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.ids import Incarnation, draw_id
from controlplane.runtime.keys import Keys
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.records import ClusterRecord, DeploymentRecord, PeerRecord
from controlplane.runtime.timing import Timings, public_server_options, timings_from_spec
from controlplane.store import Store, ensure_cluster
from controlplane.worker_link import SessionServicer
from protos.perdure.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    route_pb2,
    route_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)

T = TypeVar("T")

log = structlog.get_logger()


class Role(Enum):
    """What a control-plane process does besides answering Admin."""

    BOTH = "both"
    COORDINATOR = "coordinator"
    GATEWAY = "gateway"


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """How to run one control-plane process."""

    name: str
    cluster_name: str
    etcd: EtcdOptions
    # Written to etcd by the cluster's first process; every later one takes etcd's.
    timings: Timings
    host: str
    port: int
    # Host by which others reach this process; differs from `host` where that is a wildcard.
    advertised_host: str
    http_host: str
    http_port: int
    role: Role = Role.BOTH
    # Wanted at the first start; a deployment of the same name in etcd is left as it is, and one that was deleted, too.
    deployment: DeploymentRecord | None = None
    state_dir: Path | None = None
    limits: Limits = field(default_factory=Limits)


async def run_process(options: ProcessOptions) -> None:
    """Run until SIGTERM or SIGINT.

    Raises Rejected for what cannot work: a taken port, a taken name, wrong credentials, a lease time that etcd refuses.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    clock = SystemClock()
    client = EtcdClient(options.etcd, options.timings, clock)
    try:
        reading = asyncio.create_task(_read_cluster(client, options, clock))
        if not await _done_before(stop, reading):
            reading.cancel()
        else:
            await _Process(options, reading.result(), client, clock).run(stop)
    finally:
        await client.close()


async def _read_cluster(client: EtcdClient, options: ProcessOptions, clock: Clock) -> ClusterRecord:
    keys, timings = Keys(options.cluster_name), options.timings

    async def read() -> ClusterRecord:
        return await ensure_cluster(client, keys, timings.to_spec(), timeout=timings.session_silence)

    return await _patiently("cluster_record_awaited", read, timings, clock)


async def _done_before(stop: asyncio.Event, task: asyncio.Task[T]) -> bool:
    """Wait for `task` or `stop`. True if `task` is done."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    return task.done()


async def _patiently(event: str, call: Callable[[], Awaitable[T]], timings: Timings, clock: Clock) -> T:
    """`call`'s result, tried again for as long as etcd is away."""
    backoff = Backoff(timings, random.SystemRandom())
    while True:
        try:
            return await call()
        except Retryable as error:
            log.warning(event, reason=error.reason.text)
            await clock.sleep(backoff.next())


class _Process:
    """The parts and how they hang together."""

    def __init__(self, options: ProcessOptions, cluster: ClusterRecord, client: EtcdClient, clock: Clock) -> None:
        """Binds the gRPC port. Raises Rejected if it is taken."""
        self._options = options
        self._cluster = cluster.cluster
        self._client = client
        self._clock = clock
        self._timings = timings_from_spec(cluster.timing)
        self._keys = Keys(options.cluster_name)
        self._incarnation = Incarnation(draw_id())
        self._dice = random.SystemRandom()
        self._server = grpc.aio.server(options=public_server_options(self._timings))
        self._address = f"{options.advertised_host}:{self._bind()}"
        self._leader = LeaderWatch(client, self._keys, self._timings, clock, self._dice)
        # Names of the gRPC services, each with a health of its own.
        self._services: list[str] = []
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._registry = CollectorRegistry()
        self._gateway = self._make_gateway() if options.role is not Role.COORDINATOR else None

    async def run(self, stop: asyncio.Event) -> None:
        """Start everything, serve until `stop`, leave in order."""
        if self._gateway is not None:
            await self._gateway.start()
        election = self._make_election()
        store = Store(self._client, self._keys, election, self._timings, self._clock, self._dice)
        coordinator = self._make_coordinator(election, store)
        self._add_services(coordinator, stop.set)
        await self._server.start()
        work = asyncio.create_task(self._work(election, store, coordinator))
        try:
            await _done_before(stop, work)
            log.info("process_stopping")
        finally:
            await self._leave(work, election)

    async def _work(self, election: Election, store: Store, coordinator: Coordinator) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(supervise("leader_watch", self._leader.run, self._clock))
            if self._gateway is not None:
                tasks.create_task(self._gateway.wait())
            if self._options.role is not Role.GATEWAY:
                await self._load_tokenizers(store)
                await _patiently("registration_delayed", election.start, self._timings, self._clock)
                tasks.create_task(election.run())
                tasks.create_task(coordinator.run())
            for name in ("", *self._services):
                await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
            log.info("process_started", role=self._options.role.value, address=self._address)

    async def _load_tokenizers(self, store: Store) -> None:
        """Before this process may lead: building a tokenizer holds the interpreter's lock, which on a busy machine cost
        a fresh leader its lease (measured: 3.7 s for 262,144 tokens while ranks started)."""
        if self._gateway is None:
            return
        known = await _patiently("deployments_awaited", store.load, self._timings, self._clock)
        paths = {record.spec.model_path for record in known.deployments.values()}
        if self._options.deployment is not None:
            paths.add(self._options.deployment.spec.model_path)
        await self._gateway.expect(paths)

    async def _leave(self, work: asyncio.Task[None], election: Election) -> None:
        """Streams end, then leadership and lease are given back; the listener closes last."""
        await self._health.enter_graceful_shutdown()
        if self._gateway is not None:
            await self._gateway.stop()
        work.cancel()
        await asyncio.wait({work})
        await election.close()
        await self._server.stop(self._timings.heartbeat_interval)
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    def _bind(self) -> int:
        wanted = f"{self._options.host}:{self._options.port}"
        try:
            return self._server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise invalid(f"gRPC port {wanted} cannot be bound: is it in use?") from error

    def _make_gateway(self) -> Gateway:
        options = self._options
        return Gateway(
            options.name,
            self._incarnation,
            self._cluster,
            self._timings,
            self._leader,
            options.http_host,
            options.http_port,
            GatewayLimits(),
            self._clock,
            self._registry,
        )

    def _make_election(self) -> Election:
        peer = PeerRecord(
            name=self._options.name,
            incarnation=self._incarnation,
            address=self._address,
            url=self._gateway.url if self._gateway is not None else "",
            pid=os.getpid(),
            boot_id=host.boot_id(),
        )
        return Election(self._client, self._keys, peer, self._leader, self._timings, self._clock, self._dice)

    def _make_coordinator(self, election: Election, store: Store) -> Coordinator:
        options = self._options
        return Coordinator(
            Identity(options.name, self._incarnation, self._cluster, self._address, os.getpid()),
            store,
            election,
            self._timings,
            self._clock,
            EventLog(self._clock, options.state_dir / "events.jsonl" if options.state_dir is not None else None),
            options.limits,
            CoordinatorMetrics(self._registry),
            options.deployment,
        )

    def _add_services(self, coordinator: Coordinator, leave: Callable[[], None]) -> None:
        server = self._server
        streams = SessionStreams(coordinator, self._leader, self._timings)
        session_pb2_grpc.add_SessionServicer_to_server(SessionServicer(streams), server)
        route_pb2_grpc.add_RoutingServicer_to_server(RoutingServicer(streams), server)
        admin = AdminServicer(coordinator, self._leader, self._timings, leave)
        admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        channelz.add_channelz_servicer(server)  # pyright: ignore[reportArgumentType]  # takes both kinds of server
        described = [session_pb2.DESCRIPTOR, route_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR]
        described.append(channelz_pb2.DESCRIPTOR)
        if self._gateway is not None:
            self._gateway.add_to_server(server)
            described.append(inference_pb2.DESCRIPTOR)
        names = [service.full_name for file in described for service in file.services_by_name.values()]
        self._services = names
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
