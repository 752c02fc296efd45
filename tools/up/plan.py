"""What a local cluster consists of: nodes, control planes, the command line of each daemon. Starts nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from controlplane.config import ClusterConfig, ControlPlaneConfig, ModelSection, NodeConfig, Section
from controlplane.config_checks import cross_checks
from controlplane.config_source import ConfigError, Problem, dotted
from tools.up.process import ChildSpec
from tools.up.state import StateDir

S = TypeVar("S", bound=Section)

WILDCARD_HOSTS = frozenset({"0.0.0.0", "::"})
LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1", *WILDCARD_HOSTS})
WORKERS_DEFAULT = 2
HTTP_PORT_DEFAULT = 8000
GRPC_PORT_DEFAULT = 7700


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalShape:
    """What the flags and this machine say of the cluster's form. None: not given, so a default or the file's own."""

    workers: int | None = None
    controlplanes: int | None = None
    http_port: int | None = None
    grpc_port: int | None = None
    host: str = "127.0.0.1"
    # CUDA devices to use; 0: run on the CPU.
    cuda_devices: int = 0
    cpu_cores: int = 1


def fit_to_machine(config: ClusterConfig, shape: LocalShape, free_port: Callable[[int], int]) -> ClusterConfig:
    """`config` with every node and control plane of a cluster on this machine filled in. `free_port` gives the port
    that it is asked for if it can, else another.

    Raises ConfigError when it names another machine's nodes, or more ranks than there are devices.
    """
    nodes = _nodes(config, shape)
    _require_local(config, nodes)
    nodes = [node if node.ports else _with(node, ports=[free_port(0)]) for node in nodes]
    cluster = _with(config.cluster, nodes=nodes, controlplanes=_controlplanes(config, shape, free_port))
    on_cpu = all(device.startswith("cpu") for node in nodes for device in node.devices)
    model = _fit_model(config.model, shape, sum(len(node.devices) for node in nodes)) if on_cpu else config.model
    fitted = _with(config, cluster=cluster, model=model)
    problems = [Problem("", dotted(loc), text) for loc, text in cross_checks(fitted)]
    if problems:
        raise ConfigError(problems)
    return fitted


def _fit_model(model: ModelSection, shape: LocalShape, ranks: int) -> ModelSection:
    """The model's settings where all of `ranks` share this machine's CPU."""
    # A worker shares its node's cores among its ranks; here all workers share one machine's.
    return model if model.cpu_threads else _with(model, cpu_threads=max(1, shape.cpu_cores // ranks))


def _nodes(config: ClusterConfig, shape: LocalShape) -> list[NodeConfig]:
    if config.cluster.nodes and shape.workers is None:
        names = config.node_names()
        return [_with(node, name=name) for node, name in zip(config.cluster.nodes, names, strict=True)]
    if not shape.cuda_devices:
        workers = shape.workers or WORKERS_DEFAULT
        replicas = config.parallelism.data_parallel_size or workers
        each = -(-config.ranks_per_replica * replicas // workers)
        return [_node(index, [f"cpu:{device}" for device in range(each)]) for index in range(workers)]
    workers = shape.workers or max(1, min(WORKERS_DEFAULT, shape.cuda_devices // config.ranks_per_replica))
    each = shape.cuda_devices // workers
    if each == 0 or each * workers < config.ranks_per_replica:
        raise ConfigError(
            [
                Problem(
                    "",
                    "parallelism",
                    f"{workers} workers and {config.ranks_per_replica} ranks a replica need more than this machine's "
                    f"{shape.cuda_devices} GPUs (give --device cpu to run without them)",
                )
            ]
        )
    return [
        _node(index, [f"cuda:{device}" for device in range(index * each, (index + 1) * each)])
        for index in range(workers)
    ]


def _node(index: int, devices: list[str]) -> NodeConfig:
    return NodeConfig(name=f"worker-{index}", host="127.0.0.1", devices=devices)


def _require_local(config: ClusterConfig, nodes: list[NodeConfig]) -> None:
    problems = [
        Problem("", f"cluster.{kind}[{index}].host", f"{part.host} is not this machine: start it there ({command})")
        for kind, parts, command in (
            ("nodes", nodes, "perdure worker"),
            ("controlplanes", config.cluster.controlplanes, "perdure controlplane"),
        )
        for index, part in enumerate(parts)
        if part.host not in LOCAL_HOSTS
    ]
    if problems:
        raise ConfigError(problems)


def _controlplanes(
    config: ClusterConfig, shape: LocalShape, free_port: Callable[[int], int]
) -> list[ControlPlaneConfig]:
    given = config.cluster.controlplanes
    if given and shape.controlplanes is None:
        processes = [_with(process, name=process.name or f"cp-{index}") for index, process in enumerate(given)]
        if shape.http_port is not None:
            processes[0] = _with(processes[0], http_port=shape.http_port)
        return processes
    return [
        ControlPlaneConfig(
            name=f"cp-{index}",
            host=shape.host,
            port=free_port(GRPC_PORT_DEFAULT + index) if shape.grpc_port is None else shape.grpc_port + index,
            http_port=http_port,
        )
        for index, http_port in enumerate(gateway_ports(config, shape))
    ]


def gateway_ports(config: ClusterConfig, shape: LocalShape) -> list[int]:
    """The gateways' HTTP ports: the file's, or counted up from the first."""
    if config.cluster.controlplanes and shape.controlplanes is None:
        return [process.http_port for process in config.cluster.controlplanes]
    first = shape.http_port or HTTP_PORT_DEFAULT
    return list(range(first, first + (shape.controlplanes or 1)))


def reachable(host: str) -> str:
    """An address of this machine at which a server that listens on `host` answers."""
    return "127.0.0.1" if host in WILDCARD_HOSTS else host


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdPlan:
    """Where the etcd of a cluster listens; port 0: a free one."""

    host: str = "127.0.0.1"
    client_port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What one command starts, and where the cluster answers."""

    # What the control planes are given, in a file.
    config: ClusterConfig
    # None: etcd runs already, at config.cluster.etcd.endpoints.
    etcd: EtcdPlan | None
    controlplanes: tuple[ChildSpec, ...]
    workers: tuple[ChildSpec, ...]
    # host:port of the control planes' gRPC servers, and base URLs of the gateways, ours or another host's.
    addresses: tuple[str, ...]
    urls: tuple[str, ...]


def plan_local(config: ClusterConfig, state: StateDir) -> ClusterPlan:
    """The whole cluster on this machine, from a fitted configuration."""
    processes = config.cluster.controlplanes
    return ClusterPlan(
        config=config,
        etcd=None if config.cluster.etcd.endpoints else EtcdPlan(),
        controlplanes=tuple(controlplane_spec(process, state) for process in processes),
        workers=tuple(
            worker_spec(str(node.name), ["--config", str(state.config), *_metrics(port)], state)
            for node, port in zip(config.cluster.nodes, config.metrics_ports(), strict=True)
        ),
        addresses=tuple(f"{reachable(process.host)}:{process.port}" for process in processes),
        urls=tuple(f"http://{reachable(process.host)}:{process.http_port}" for process in processes),
    )


def _metrics(port: int | None) -> list[str]:
    return [] if port is None else ["--metrics-port", str(port)]


def controlplane_spec(process: ControlPlaneConfig, state: StateDir) -> ChildSpec:
    """How to start one control plane of the configuration in `state.config`."""
    return ChildSpec(
        name=str(process.name),
        argv=(
            sys.executable,
            *("-m", "controlplane"),
            *("--config", str(state.config)),
            *("--name", str(process.name)),
            *("--host", process.host),
            *("--advertise-host", reachable(process.host)),
            *("--port", str(process.port)),
            *("--http-port", str(process.http_port)),
            *("--state-dir", str(state.path)),
            *("--log-format", "json"),
        ),
        log_path=state.logs / f"{process.name}.log",
    )


def worker_spec(node: str, arguments: list[str], state: StateDir) -> ChildSpec:
    """How to start one worker daemon; `arguments` tell it its etcd and devices."""
    return ChildSpec(
        name=node,
        argv=(
            sys.executable,
            *("-m", "dataplane"),
            *("--node", node),
            *arguments,
            *("--state-dir", str(state.path)),
            *("--log-format", "json"),
        ),
        log_path=state.logs / f"{node}.log",
    )


def _with(section: S, **changes: object) -> S:
    """A copy of a section with some values changed, checked like the original."""
    return type(section).model_validate({**section.model_dump(), **changes})
