"""`perdure serve`: the plan of one host's part of a cluster."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from controlplane.config import ClusterConfig, ControlPlaneConfig, EtcdConfig
from tools.up.checks import CheckFailed, check_and_prepare, cuda_devices
from tools.up.display import Display
from tools.up.plan import ClusterPlan, EtcdPlan, controlplane_spec, worker_spec
from tools.up.state import StateDir


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPart:
    """Which host of a cluster this is, and where its first host answers."""

    rank: int
    world_size: int
    # Of rank 0, as the others reach it.
    master_host: str
    # etcd's client port there.
    master_port: int
    grpc_port: int
    http_port: int
    # "auto", "cpu" or "cuda".
    device: str


async def plan_host(config: ClusterConfig, part: HostPart, state: StateDir, display: Display) -> ClusterPlan:
    """Check this host, prepare the model, and say what to start. Raises ConfigError and what the checks raise."""
    master = address_of(part.master_host)
    devices = host_devices(cuda_devices(part.device), config.ranks_per_replica, part.world_size)
    fitted = fit_to_hosts(config, part, master, len(devices))
    prepared = await check_and_prepare(
        fitted,
        display,
        replicas_here=max(1, len(devices) // config.ranks_per_replica),
        etcd_needed=part.rank == 0 and not config.cluster.etcd.endpoints,
    )
    leads = part.rank == 0
    given = config.cluster.etcd.endpoints
    endpoints = given or [f"{master}:{part.master_port}"]
    worker = [
        *etcd_arguments(config.cluster.etcd, endpoints),
        *("--cluster", config.cluster.name),
        *("--host", master if leads else own_address(master)),
        *("--devices", ",".join(devices)),
    ]
    return ClusterPlan(
        config=prepared if leads else prepared.with_etcd(endpoints),
        etcd=EtcdPlan(host=master, client_port=part.master_port) if leads and not given else None,
        controlplanes=tuple(controlplane_spec(process, state) for process in prepared.cluster.controlplanes),
        workers=(worker_spec(f"worker-{part.rank}", worker, state),),
        addresses=(f"{master}:{part.grpc_port}",),
        urls=(f"http://{master}:{part.http_port}",),
    )


def etcd_arguments(etcd: EtcdConfig, endpoints: list[str]) -> list[str]:
    """The worker's flags for reaching etcd. Raises CheckFailed for what flags cannot carry."""
    if etcd.password_file:
        raise CheckFailed("cluster.etcd.password_file: start `perdure worker` itself, with PERDURE_ETCD_PASSWORD set")
    flags = {
        "--etcd": ",".join(endpoints),
        "--etcd-ca": etcd.ca_file,
        "--etcd-cert": etcd.cert_file,
        "--etcd-key": etcd.key_file,
    }
    return [part for flag, value in flags.items() if value for part in (flag, value)]


def host_devices(cuda: int, ranks_per_replica: int, world_size: int) -> list[str]:
    """This host's devices: its GPUs, or as many shares of its CPU as one replica needs of each host."""
    if cuda:
        return [f"cuda:{index}" for index in range(cuda)]
    return [f"cpu:{index}" for index in range(-(-ranks_per_replica // world_size))]


def fit_to_hosts(config: ClusterConfig, part: HostPart, master: str, devices_each: int) -> ClusterConfig:
    """`config` for hosts that are all alike: replicas counted over all of them, the control plane at rank 0 only.

    Raises CheckFailed when all hosts together hold no replica.
    """
    devices = devices_each * part.world_size
    replicas = config.parallelism.data_parallel_size or devices // config.ranks_per_replica
    if replicas * config.ranks_per_replica > devices or replicas == 0:
        raise CheckFailed(
            f"{max(1, replicas)} replicas of {config.ranks_per_replica} ranks need more than the {devices} devices "
            f"of {part.world_size} hosts"
        )
    process = ControlPlaneConfig(name="cp-0", host=master, port=part.grpc_port, http_port=part.http_port)
    cluster = config.cluster.model_copy(update={"nodes": [], "controlplanes": [process] if part.rank == 0 else []})
    parallelism = config.parallelism.model_copy(update={"data_parallel_size": replicas})
    return config.model_copy(update={"cluster": cluster, "parallelism": parallelism})


def address_of(host: str) -> str:
    """The IPv4 address of a host's name; etcd listens on addresses only. Raises CheckFailed."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise CheckFailed(f"--master-addr {host} cannot be resolved: {error.strerror}") from error


def own_address(master: str) -> str:
    """This host's address as `master` sees it. Sends nothing: connecting a datagram socket only picks the route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 1))
        return probe.getsockname()[0]
