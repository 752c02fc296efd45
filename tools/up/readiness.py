"""Watches a starting cluster through Admin and its gateways until it serves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
import grpc
import grpc.aio

from controlplane.config import ClusterConfig
from controlplane.runtime.timing import Timings, channel_options
from protos.perdure.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from tools.up.display import Display

PHASE_NOTES = {
    common_pb2.REPLICA_PHASE_HELD: "waiting for a worker's rank",
    common_pb2.REPLICA_PHASE_CLOSED: "closed",
    common_pb2.REPLICA_PHASE_PLANNED: "planned",
    common_pb2.REPLICA_PHASE_PREPARING: "starting ranks",
    common_pb2.REPLICA_PHASE_FORMING: "forming its group",
    common_pb2.REPLICA_PHASE_READY: "ready",
}
GIVEN_UP = (common_pb2.REPLICA_PHASE_DEGRADED, common_pb2.REPLICA_PHASE_FAILED)

READY_SHARE = 0.9
"""Of the cluster's bar; the rest is for the gateways to agree."""


class ModelRefused(RuntimeError):
    """The cluster cannot serve its model; the text is the reason that a replica gave."""


async def wait_ready(addresses: Sequence[str], urls: Sequence[str], config: ClusterConfig, display: Display) -> None:
    """Return when every replica is ready and every gateway says so. Raises ModelRefused."""
    timings = config.timings()
    wanted = config.replicas
    while True:
        status = await _status(addresses, timings)
        if status is not None:
            _show(status, config.model.deployment, display)
            ready = _ready_replicas(status, config.model.deployment)
            if ready >= wanted and await _gateways_ready(urls, timings):
                display.bar("cluster", 1, "ready")
                return
            display.bar("cluster", READY_SHARE * ready / wanted, f"{ready} of {wanted} replicas ready")
        await asyncio.sleep(timings.heartbeat_interval)


async def _status(addresses: Sequence[str], timings: Timings) -> admin_pb2.StatusResponse | None:
    """What the first control plane that answers says; None while none does."""
    for address in addresses:
        async with grpc.aio.insecure_channel(address, options=channel_options(timings)) as channel:
            try:
                return await admin_pb2_grpc.AdminStub(channel).Status(
                    admin_pb2.StatusRequest(), timeout=timings.session_silence, wait_for_ready=True
                )
            except grpc.aio.AioRpcError:
                continue
    return None


def _show(status: admin_pb2.StatusResponse, deployment: str, display: Display) -> None:
    for replica in status.replicas:
        if replica.deployment != deployment:
            continue
        if replica.phase in GIVEN_UP:
            raise ModelRefused(f"replica {replica.id} cannot be brought up: {replica.reason.text}")
        fraction = 1.0 if replica.phase == common_pb2.REPLICA_PHASE_READY else replica.load_fraction
        note = PHASE_NOTES.get(replica.phase) or replica.load_stage or "loading"
        display.bar(f"replica {replica.id}", fraction, note)


def _ready_replicas(status: admin_pb2.StatusResponse, deployment: str) -> int:
    return sum(
        replica.phase == common_pb2.REPLICA_PHASE_READY
        for replica in status.replicas
        if replica.deployment == deployment
    )


async def _gateways_ready(urls: Sequence[str], timings: Timings) -> bool:
    timeout = aiohttp.ClientTimeout(total=timings.session_silence)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for url in urls:
            try:
                async with session.get(f"{url}/ready") as response:
                    if response.status != 200:
                        return False
            except (aiohttp.ClientError, TimeoutError):
                return False
    return True
