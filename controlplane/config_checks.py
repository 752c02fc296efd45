"""Checks that need more than one value: degrees against devices, ports against ports, times against each other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from controlplane.config_source import Loc, dotted
from controlplane.runtime.timing import TimingError, Timings, derive_timings

if TYPE_CHECKING:
    from controlplane.config import ClusterConfig

Finding = tuple[Loc, str]


def cross_checks(config: ClusterConfig) -> Iterator[Finding]:
    """Everything that is wrong between the values of a configuration whose single values are right."""
    return chain(
        _degrees(config), _device_kinds(config), _node_names(config), _addresses(config), _etcd(config), _times(config)
    )


def _degrees(config: ClusterConfig) -> Iterator[Finding]:
    sizes = config.parallelism
    tensor, pipeline, expert = sizes.tensor_parallel_size, sizes.pipeline_parallel_size, sizes.expert_parallel_size
    if tensor % expert:
        yield (
            ("parallelism", "expert_parallel_size"),
            f"{expert} does not divide tensor_parallel_size {tensor}: experts lie across the tensor ranks of a stage",
        )
    if not config.cluster.nodes:
        return
    devices = sum(len(node.devices) for node in config.cluster.nodes)
    data = sizes.data_parallel_size or 1
    if tensor * pipeline * data > devices:
        yield (
            ("parallelism",),
            f"tensor {tensor} × pipeline {pipeline} × data {data} = {tensor * pipeline * data} ranks, "
            f"but the nodes have {devices} device{'s' if devices > 1 else ''}",
        )


def _device_kinds(config: ClusterConfig) -> Iterator[Finding]:
    kinds = {device.split(":")[0] for node in config.cluster.nodes for device in node.devices}
    if len(kinds) > 1:
        yield ("cluster", "nodes"), "mixes cpu and cuda devices; one deployment runs on one kind"
    if config.communication.backend == "nccl" and kinds == {"cpu"}:
        yield ("communication", "backend"), "nccl needs cuda devices, but the nodes list only cpu devices"
    for index, node in enumerate(config.cluster.nodes):
        doubled = {device for device in node.devices if node.devices.count(device) > 1}
        for device in sorted(doubled):
            yield ("cluster", "nodes", index, "devices"), f"lists {device} more than once"


def _node_names(config: ClusterConfig) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for index, name in enumerate(config.node_names()):
        if name in first:
            yield ("cluster", "nodes", index), f"is named {name!r}, as is cluster.nodes[{first[name]}]"
        first.setdefault(name, index)


def _addresses(config: ClusterConfig) -> Iterator[Finding]:
    """No two listeners on one host:port, whoever they belong to; nor one device in two nodes of a host."""
    owners: dict[tuple[str, int], str] = {}
    for loc, host, port in _listeners(config):
        owner = owners.setdefault((host, port), dotted(loc))
        if owner != dotted(loc):
            yield loc, f"{host}:{port} is already taken by {owner}"
    holders: dict[tuple[str, str], int] = {}
    for index, node in enumerate(config.cluster.nodes):
        for device in node.devices:
            holder = holders.setdefault((node.host, device), index)
            if holder != index and device.startswith("cuda"):
                yield ("cluster", "nodes", index, "devices"), f"{device} of {node.host} is cluster.nodes[{holder}]'s"


def _listeners(config: ClusterConfig) -> Iterator[tuple[Loc, str, int]]:
    for index, node in enumerate(config.cluster.nodes):
        for place, port in enumerate(node.ports):
            yield ("cluster", "nodes", index, "ports", place), node.host, port
    for index, (node, port) in enumerate(zip(config.cluster.nodes, config.metrics_ports(), strict=True)):
        if port is not None:
            yield ("monitoring", "metrics_port", index), node.host, port
    for index, process in enumerate(config.cluster.controlplanes):
        yield ("cluster", "controlplanes", index, "port"), process.host, process.port
        yield ("cluster", "controlplanes", index, "http_port"), process.host, process.http_port


def _etcd(config: ClusterConfig) -> Iterator[Finding]:
    etcd = config.cluster.etcd
    for index, endpoint in enumerate(etcd.endpoints):
        address = endpoint.removeprefix("http://").removeprefix("https://")
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            yield ("cluster", "etcd", "endpoints", index), f"{endpoint!r} is not host:port"
    if bool(etcd.cert_file) != bool(etcd.key_file):
        yield ("cluster", "etcd"), "cert_file and key_file belong together"
    if bool(etcd.username) != bool(etcd.password_file):
        yield ("cluster", "etcd"), "username and password_file belong together"


def _times(config: ClusterConfig) -> Iterator[Finding]:
    recovery = config.fault_tolerance
    try:
        timings = derive_timings(recovery.failure_timeout, recovery.heartbeat_interval)
    except TimingError as error:
        place = "heartbeat_interval" if str(error).startswith("heartbeat_interval") else "failure_timeout"
        yield ("fault_tolerance", place), str(error)
        return
    yield from _asked_times(config, timings)


def _asked_times(config: ClusterConfig, timings: Timings) -> Iterator[Finding]:
    """The two times that are derived, not set: what is asked for must not be shorter."""
    timeout, interval = config.communication.timeout, config.monitoring.health_check_interval
    if timeout is not None and timeout < timings.collective_timeout:
        yield (
            ("communication", "timeout"),
            f"{timeout:g} s is less than the collective timeout that follows from failure_timeout "
            f"({timings.collective_timeout:g} s): lower fault_tolerance.failure_timeout to at most "
            f"{timeout + timings.heartbeat_interval:g} s",
        )
    if interval is not None and interval < timings.heartbeat_interval:
        yield (
            ("monitoring", "health_check_interval"),
            f"{interval:g} s is less than heartbeat_interval ({timings.heartbeat_interval:g} s), "
            "which is how often workers report",
        )
