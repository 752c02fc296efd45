"""What a daemon must know before it begins: its cluster, its times, its devices, itself."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from random import Random

import structlog

from controlplane.runtime import host
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.clock import Clock
from controlplane.runtime.cluster import read_cluster
from controlplane.runtime.errors import Rejected, Retryable
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.ids import ClusterId, Incarnation, draw_id
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.records import ClusterRecord
from controlplane.runtime.timing import Timings, derive_timings
from dataplane.config import WorkerConfig
from dataplane.core.state import Identity
from dataplane.devices import describe, held_by_others

log = structlog.get_logger()

PACKAGES = ("perdure", "torch", "transformers", "grpcio")
"""Whose versions the leader is told."""


async def await_cluster(config: WorkerConfig, clock: Clock, random: Random) -> ClusterRecord:
    """The cluster's record. A worker may start before etcd and before any control plane: waits for both, for ever.

    Raises EtcdDenied for wrong credentials, and Rejected for a record that cannot be read.
    """
    # The cluster's own times stand in the record; until it is read, the defaults must do.
    timings = derive_timings()
    client = EtcdClient(config.etcd, timings, clock)
    backoff, said = Backoff(timings, random), ""
    try:
        while True:
            try:
                record = await read_cluster(client, config.keys, timeout=timings.session_silence)
            except Retryable as error:
                record, why = None, error.reason.text
            else:
                why = "no control plane has started yet"
            if record is not None:
                return record
            if why != said:
                said = why
                log.info("cluster_awaited", cluster=config.keys.cluster_name, reason=why)
            await clock.sleep(backoff.next())
    finally:
        await client.close()


async def await_devices(config: WorkerConfig, cluster: ClusterId, timings: Timings, clock: Clock) -> None:
    """Wait while a dying predecessor's ranks still hold our devices. Raises Rejected for those that are held on."""
    patience_ends = clock.now() + timings.failure_timeout
    while held := held_by_others(cluster, config.node, config.devices):
        if clock.now() >= patience_ends:
            names = ", ".join(f"{item.device} (process {item.holder or 'unknown'})" for item in held)
            text = f"devices in use by another worker: {names}"
            raise Rejected(Reason(kind=ReasonKind.NO_CAPACITY, text=text, node=config.node))
        await clock.sleep(timings.reconnect_min)


def identify(config: WorkerConfig, cluster: ClusterRecord, port: int) -> Identity:
    """This daemon, from now to its end."""
    return Identity(
        cluster=cluster.cluster,
        node=config.node,
        incarnation=Incarnation(draw_id()),
        serve_address=f"{config.host}:{port}",
        boot_id=host.boot_id(),
        host=platform.node(),
        pid=os.getpid(),
        devices=describe(config.devices),
        versions=tuple(_versions().items()),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
