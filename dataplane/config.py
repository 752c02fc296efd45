"""A worker daemon's settings, from its flags and, for its own node, from the cluster's file.

Bad input raises Rejected with one line that names the flag or the key.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from controlplane.runtime.errors import invalid
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.ids import NodeId
from controlplane.runtime.keys import Keys
from dataplane.devices import parse_devices

DEFAULT_CLUSTER = "local"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_STATE_DIR = Path(".perdure")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFlags:
    """The command line as given; None and "" stand for flags left out."""

    etcd: str = ""
    node: str = ""
    cluster: str = ""
    host: str = ""
    port: int | None = None
    devices: str = ""
    config: Path | None = None
    state_dir: Path | None = None
    metrics_port: int | None = None
    etcd_ca: Path | None = None
    etcd_cert: Path | None = None
    etcd_key: Path | None = None
    etcd_user: str = ""
    etcd_password: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a daemon runs with."""

    node: NodeId
    keys: Keys
    etcd: EtcdOptions
    host: str
    # 0: a free one.
    port: int
    devices: tuple[str, ...]
    # Devices of the CPU on this host, those of its other nodes in the file too: so many ranks share its cores.
    cpu_ranks: int = 0
    # Logs of ranks and zygote go below it.
    state_dir: Path
    metrics_port: int | None = None

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "workers" / self.node


@dataclass(frozen=True, slots=True)
class _File:
    """The part of the cluster's file that concerns one worker. The control plane checks the whole."""

    path: Path | None
    cluster: dict[str, Any]

    def node(self, name: str) -> dict[str, Any]:
        if self.path is None:
            return {}
        nodes = _mappings(self.cluster.get("nodes"), f"{self.path}: cluster.nodes")
        for index, node in enumerate(nodes):
            if name == _node_name(nodes, index):
                return node
        known = ", ".join(_node_name(nodes, index) for index in range(len(nodes)))
        raise invalid(f"--node {name!r} is not in {self.path}, which has {known or 'no nodes'}")

    def beside(self, name: str) -> list[dict[str, Any]]:
        """The other nodes on the host of the node of that name."""
        own = self.node(name)
        return [node for node in self.cluster.get("nodes") or () if own and node != own and _host(node) == _host(own)]

    def etcd(self) -> dict[str, Any]:
        return _mapping(self.cluster.get("etcd"), f"{self.path}: cluster.etcd")


def resolve(flags: WorkerFlags) -> WorkerConfig:
    """Flags first, then the file, then defaults."""
    if not flags.node:
        raise invalid("--node is missing: the name of this node in the cluster")
    file = _read(flags.config)
    node = file.node(flags.node)
    ports = node.get("ports") or [0]
    devices = parse_devices(flags.devices or ",".join(map(_device, node.get("devices") or ["auto"])))
    neighbours = [_device(value) for other in file.beside(flags.node) for value in other.get("devices") or ()]
    config = WorkerConfig(
        node=NodeId(flags.node),
        keys=Keys(flags.cluster or str(file.cluster.get("name") or DEFAULT_CLUSTER)),
        etcd=_etcd(flags, file.etcd()),
        host=flags.host or str(node.get("host") or DEFAULT_HOST),
        port=_port("--port", flags.port if flags.port is not None else ports[0]),
        devices=devices,
        cpu_ranks=sum(device.startswith("cpu:") for device in (*devices, *neighbours)),
        state_dir=flags.state_dir or DEFAULT_STATE_DIR,
        metrics_port=None if flags.metrics_port is None else _port("--metrics-port", flags.metrics_port),
    )
    config.keys.node(config.node)
    _check_state_dir(config)
    return config


def check_port_free(host: str, port: int, flag: str) -> None:
    """Raises Rejected if nothing could listen there now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise invalid(f"{flag} {host}:{port} cannot be listened on: {error.strerror}") from error


def _etcd(flags: WorkerFlags, section: dict[str, Any]) -> EtcdOptions:
    endpoints = tuple(part.strip() for part in flags.etcd.split(",") if part.strip())
    if not endpoints:
        endpoints = tuple(map(str, section.get("endpoints") or ()))
    if not endpoints:
        raise invalid("--etcd is missing: host:port of etcd, several with commas between them")
    password = flags.etcd_password
    if not password and section.get("password_file"):
        password = _read_text(Path(str(section["password_file"]))).strip()
    options = EtcdOptions(
        endpoints=endpoints,
        user=flags.etcd_user or str(section.get("username") or ""),
        password=password,
        ca=flags.etcd_ca or _path(section.get("ca_file")),
        cert=flags.etcd_cert or _path(section.get("cert_file")),
        key=flags.etcd_key or _path(section.get("key_file")),
    )
    for name, path in (("--etcd-ca", options.ca), ("--etcd-cert", options.cert), ("--etcd-key", options.key)):
        if path is not None:
            _read_text(path, name)
    return options


def _read(path: Path | None) -> _File:
    if path is None:
        return _File(None, {})
    try:
        document = yaml.safe_load(_read_text(path, "--config"))
    except yaml.YAMLError as error:
        raise invalid(f"--config {path}: {' '.join(str(error).split())}") from error
    top = _mapping(document, str(path))
    return _File(path, _mapping(top.get("cluster"), f"{path}: cluster"))


def _read_text(path: Path, flag: str = "") -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        text = error.strerror if isinstance(error, OSError) else "not a text file"
        raise invalid(f"{flag} {path}: {text}".strip()) from error


def _check_state_dir(config: WorkerConfig) -> None:
    try:
        config.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise invalid(f"--state-dir {config.state_dir}: {error.strerror}") from error


def _mapping(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"{where} must be a mapping")
    return value


def _mappings(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise invalid(f"{where} must be a list")
    return [_mapping(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _node_name(nodes: list[dict[str, Any]], index: int) -> str:
    """Its own name, or its host's, numbered where a host has several nodes."""
    hosts = [node.get("host") for node in nodes]
    host = str(hosts[index])
    default = host if hosts.count(host) == 1 else f"{host}-{hosts[:index].count(host)}"
    return str(nodes[index].get("name") or default)


def _host(node: dict[str, Any]) -> str:
    return str(node.get("host") or DEFAULT_HOST)


def _device(value: object) -> str:
    # A bare number is a CUDA index, as in CUDA_VISIBLE_DEVICES.
    return f"cuda:{value}" if isinstance(value, int) else str(value)


def _port(flag: str, value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= 65535:
        raise invalid(f"{flag} {value!r} is no port")
    return value


def _path(value: object) -> Path | None:
    return Path(str(value)) if value else None
