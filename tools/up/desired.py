"""Makes what etcd holds agree with the configuration of this `perdure up`; a state folder outlives its flags."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio

from controlplane.config import ClusterConfig
from controlplane.runtime.clock import SystemClock
from controlplane.runtime.cluster import read_cluster
from controlplane.runtime.codec import Codec
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.keys import Keys
from controlplane.runtime.records import DeploymentRecord
from controlplane.runtime.timing import Timings, channel_options
from protos.perdure.v1 import admin_pb2, admin_pb2_grpc

_SPEC = Codec(DeploymentRecord, admin_pb2.DeploymentSpec)
_NOT_YET = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


class DeploymentRefused(RuntimeError):
    """The leader does not take the deployment; the text is its reason."""


async def forget_other_timing(endpoint: str, config: ClusterConfig) -> None:
    """Drop the cluster's record when its times are not the configured ones, so that the next control plane writes a
    new one. Only for an etcd that nobody uses yet."""
    timings = config.timings()
    client = EtcdClient(EtcdOptions(endpoints=(endpoint,)), timings, SystemClock())
    keys = Keys(config.cluster.name)
    try:
        record = await read_cluster(client, keys, timeout=timings.session_silence)
        if record is not None and record.timing != timings.to_spec():
            await client.delete(keys.cluster, timeout=timings.session_silence)
    finally:
        await client.close()


async def apply_deployment(addresses: Sequence[str], config: ClusterConfig) -> None:
    """Make the configured deployment the desired state, as soon as a control plane leads. Raises DeploymentRefused."""
    timings = config.timings()
    request = admin_pb2.ApplyRequest(deployment=_SPEC.to_proto(config.deployment()))
    while True:
        for address in addresses:
            if await _applied(address, request, timings):
                return
        await asyncio.sleep(timings.reconnect_min)


async def _applied(address: str, request: admin_pb2.ApplyRequest, timings: Timings) -> bool:
    async with grpc.aio.insecure_channel(address, options=channel_options(timings)) as channel:
        try:
            await admin_pb2_grpc.AdminStub(channel).Apply(request, timeout=timings.stage)
        except grpc.aio.AioRpcError as error:
            if error.code() in _NOT_YET:
                return False
            raise DeploymentRefused(f"the deployment is refused: {error.details()}") from error
    return True
