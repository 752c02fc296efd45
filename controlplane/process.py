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
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from controlplane.admin import AdminServicer
from controlplane.coordinator import Coordinator, Identity
from controlplane.core.state import Limits
from controlplane.election import Election
from controlplane.event_log import EventLog
from controlplane.gateway.gateway import Gateway
from controlplane.leader_stream import SessionStreams
from controlplane.route_link import RoutingServicer
from controlplane.runtime import host
from controlplane.runtime.actor import supervise
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.clock import Clock, SystemClock
from controlplane.runtime.errors import Retryable, invalid
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.ids import GatewayId, Incarnation, draw_id
from controlplane.runtime.keys import Keys
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.records import ClusterRecord, DeploymentRecord, PeerRecord
from controlplane.runtime.timing import Timings, server_options, timings_from_spec
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
    # Wanted at the first start; a deployment of the same name in etcd is left as it is.
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
        cluster = await _patiently(
            "cluster_record_awaited", lambda: _read_cluster(client, options), options.timings, clock
        )
        process = _Process(options, cluster, client, clock)
        await process.run(stop)
    finally:
        await client.close()


async def _read_cluster(client: EtcdClient, options: ProcessOptions) -> ClusterRecord:
    timings = options.timings
    return await ensure_cluster(client, Keys(options.cluster_name), timings.to_spec(), timeout=timings.session_silence)


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
        self._options = options
        self._clock = clock
        self._timings = timings_from_spec(cluster.timing)
        self._server = grpc.aio.server(options=server_options(self._timings))
        address = f"{options.advertised_host}:{self._bind()}"
        dice = random.SystemRandom()
        keys = Keys(options.cluster_name)
        incarnation = Incarnation(draw_id())
        self._leader = LeaderWatch(client, keys, self._timings, clock, dice)
        self._gateway = self._make_gateway(cluster, incarnation)
        peer = PeerRecord(
            name=options.name,
            incarnation=incarnation,
            address=address,
            url=self._gateway.url if self._gateway is not None else "",
            pid=os.getpid(),
            boot_id=host.boot_id(),
        )
        self._election = Election(client, keys, peer, self._leader, self._timings, clock, dice)
        self._coordinator = Coordinator(
            Identity(options.name, incarnation, cluster.cluster, address, os.getpid()),
            Store(client, keys, self._election, self._timings, clock, dice),
            self._election,
            self._timings,
            clock,
            EventLog(clock, options.state_dir / "events.jsonl" if options.state_dir is not None else None),
            options.limits,
            options.deployment,
        )
        self._health = health.aio.HealthServicer()
        self._add_services()

    @property
    def _leads(self) -> bool:
        return self._options.role is not Role.GATEWAY

    def _bind(self) -> int:
        wanted = f"{self._options.host}:{self._options.port}"
        try:
            return self._server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise invalid(f"gRPC port {wanted} cannot be bound: is it in use?") from error

    def _make_gateway(self, cluster: ClusterRecord, incarnation: Incarnation) -> Gateway | None:
        if self._options.role is Role.COORDINATOR:
            return None
        return Gateway(
            name=GatewayId(self._options.name),
            incarnation=incarnation,
            cluster=cluster.cluster,
            timings=self._timings,
            leader=self._leader,
            http_host=self._options.http_host,
            http_port=self._options.http_port,
            clock=self._clock,
        )

    def _add_services(self) -> None:
        streams = SessionStreams(self._coordinator, self._leader, self._timings)
        session_pb2_grpc.add_SessionServicer_to_server(SessionServicer(streams), self._server)
        route_pb2_grpc.add_RoutingServicer_to_server(RoutingServicer(streams), self._server)
        admin_pb2_grpc.add_AdminServicer_to_server(
            AdminServicer(self._coordinator, self._leader, self._timings), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz.add_channelz_servicer(self._server)  # pyright: ignore[reportArgumentType]  # takes both kinds
        descriptors = [session_pb2.DESCRIPTOR, route_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR]
        if self._gateway is not None:
            self._gateway.add_to_server(self._server)
            descriptors.append(inference_pb2.DESCRIPTOR)
        names = [service.full_name for file in descriptors for service in file.services_by_name.values()]
        known = [health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, "grpc.channelz.v1.Channelz"]
        reflection.enable_server_reflection([*names, *known, reflection.SERVICE_NAME], self._server)

    async def run(self, stop: asyncio.Event) -> None:
        """Start everything, serve until `stop`, leave in order."""
        if self._gateway is not None:
            await self._gateway.start()
        await self._server.start()
        work = asyncio.create_task(self._work())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            log.info("process_stopping", name=self._options.name)
        finally:
            stopping.cancel()
            await self._leave(work)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(supervise("leader_watch", self._leader.run, self._clock))
            if self._leads:
                await _patiently("registration_delayed", self._election.start, self._timings, self._clock)
                tasks.create_task(self._election.run())
                tasks.create_task(self._coordinator.run())
            await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
            log.info("process_started", name=self._options.name, role=self._options.role.value)

    async def _leave(self, work: asyncio.Task[None]) -> None:
        await self._health.enter_graceful_shutdown()
        if self._gateway is not None:
            await self._gateway.stop()
        await self._election.close()
        work.cancel()
        await asyncio.wait({work})
        await self._server.stop(self._timings.heartbeat_interval)
