"""What a local cluster consists of, decided from a configuration and a machine."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from controlplane.config import ClusterConfig, EtcdConfig
from controlplane.config_source import ConfigError, Override
from tools.up.checks import CheckFailed, FreePorts
from tools.up.host_part import HostPart, etcd_arguments, fit_to_hosts, host_devices
from tools.up.plan import LocalShape, fit_to_machine, plan_local
from tools.up.state import StateDir


def config(**parallelism: int) -> ClusterConfig:
    return ClusterConfig.from_flags(
        {("parallelism", key): Override(value, f"--{key}") for key, value in parallelism.items()}
    )


def fit(settings: ClusterConfig, shape: LocalShape) -> ClusterConfig:
    others = count(20000)
    return fit_to_machine(settings, shape, lambda preferred: preferred or next(others))


def test_default_is_one_replica_a_worker_on_two_workers() -> None:
    fitted = fit(config(), LocalShape(cpu_cores=8))
    assert [node.devices for node in fitted.cluster.nodes] == [["cpu:0"], ["cpu:0"]]
    assert fitted.replicas == 2
    assert [(process.port, process.http_port) for process in fitted.cluster.controlplanes] == [(7700, 8000)]


def test_each_worker_has_the_devices_its_replica_needs() -> None:
    fitted = fit(config(tensor_parallel_size=2, pipeline_parallel_size=2), LocalShape(workers=3))
    assert [len(node.devices) for node in fitted.cluster.nodes] == [4, 4, 4]
    assert fitted.replicas == 3


def test_one_replica_is_spread_over_two_workers() -> None:
    fitted = fit(config(tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=1), LocalShape(workers=2))
    assert [len(node.devices) for node in fitted.cluster.nodes] == [2, 2]
    assert fitted.replicas == 1


def test_cpu_cores_are_shared_by_all_ranks_of_the_machine() -> None:
    assert fit(config(), LocalShape(workers=2, cpu_cores=8)).model.cpu_threads == 4
    assert fit(config(), LocalShape(workers=4, cpu_cores=2)).model.cpu_threads == 1


def test_gpus_are_split_over_the_workers() -> None:
    fitted = fit(config(), LocalShape(cuda_devices=8, cpu_cores=8))
    assert [node.devices[0] for node in fitted.cluster.nodes] == ["cuda:0", "cuda:4"]
    assert fitted.replicas == 8
    assert fitted.model.cpu_threads == 0


def test_one_gpu_gets_one_worker() -> None:
    fitted = fit(config(), LocalShape(cuda_devices=1))
    assert [node.devices for node in fitted.cluster.nodes] == [["cuda:0"]]


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 workers and 4 ranks a replica need more than this machine's 2 GPUs"):
        fit(config(tensor_parallel_size=4), LocalShape(cuda_devices=2))


def test_control_planes_count_their_ports_up() -> None:
    fitted = fit(config(), LocalShape(controlplanes=3, http_port=9000, grpc_port=9700))
    assert [(process.name, process.port, process.http_port) for process in fitted.cluster.controlplanes] == [
        ("cp-0", 9700, 9000),
        ("cp-1", 9701, 9001),
        ("cp-2", 9702, 9002),
    ]


def test_a_gateway_port_that_is_taken_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="8000 is already taken"):
        fit(config(), LocalShape(http_port=8000, grpc_port=8000))


def test_nodes_of_the_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster: {nodes: [{host: 127.0.0.1, ports: [7811], devices: [cpu:0, cpu:1]}]}")
    fitted = fit(ClusterConfig.load(path), LocalShape())
    assert [(node.name, node.ports, len(node.devices)) for node in fitted.cluster.nodes] == [("127.0.0.1", [7811], 2)]


def test_another_machines_node_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster: {nodes: [{host: 10.1.2.3, devices: [cpu:0]}]}")
    with pytest.raises(ConfigError, match=r"10\.1\.2\.3 is not this machine: start it there \(perdure worker\)"):
        fit(ClusterConfig.load(path), LocalShape())


def test_plan_names_every_process_and_address(tmp_path: Path) -> None:
    fitted = fit(config(), LocalShape(host="0.0.0.0", controlplanes=2))
    plan = plan_local(fitted, StateDir(tmp_path))
    assert [spec.name for spec in (*plan.controlplanes, *plan.workers)] == ["cp-0", "cp-1", "worker-0", "worker-1"]
    assert plan.urls == ("http://127.0.0.1:8000", "http://127.0.0.1:8001")
    assert plan.addresses == ("127.0.0.1:7700", "127.0.0.1:7701")
    assert plan.etcd is not None


def test_an_etcd_that_runs_already_is_used(tmp_path: Path) -> None:
    fitted = fit(config(), LocalShape()).with_etcd(["10.0.0.1:2379"])
    assert plan_local(fitted, StateDir(tmp_path)).etcd is None


def test_a_port_is_handed_out_once() -> None:
    ports = FreePorts([7700])
    first = ports(7700)
    assert first != 7700
    assert ports(first) != first


def part(rank: int, world_size: int) -> HostPart:
    return HostPart(
        rank=rank,
        world_size=world_size,
        master_host="10.0.0.1",
        master_port=2379,
        grpc_port=7700,
        http_port=8000,
        device="auto",
    )


@pytest.mark.parametrize(
    ("cuda", "ranks", "hosts", "devices", "replicas"),
    [(0, 1, 2, 1, 2), (0, 4, 2, 2, 1), (0, 2, 3, 1, 1), (8, 4, 2, 8, 4), (8, 16, 2, 8, 1)],
)
def test_hosts_share_the_replicas(cuda: int, ranks: int, hosts: int, devices: int, replicas: int) -> None:
    assert len(host_devices(cuda, ranks, hosts)) == devices
    fitted = fit_to_hosts(config(tensor_parallel_size=ranks), part(0, hosts), "10.0.0.1", devices)
    assert fitted.replicas == replicas
    assert [process.host for process in fitted.cluster.controlplanes] == ["10.0.0.1"]
    assert not fit_to_hosts(
        config(tensor_parallel_size=ranks), part(1, hosts), "10.0.0.1", devices
    ).cluster.controlplanes


def test_an_etcd_with_tls_is_passed_on_to_a_hosts_worker() -> None:
    assert etcd_arguments(EtcdConfig(), ["a:1", "b:2"]) == ["--etcd", "a:1,b:2"]
    assert etcd_arguments(EtcdConfig(ca_file="/ca.pem"), ["a:1"]) == ["--etcd", "a:1", "--etcd-ca", "/ca.pem"]
    with pytest.raises(CheckFailed, match="PERDURE_ETCD_PASSWORD"):
        etcd_arguments(EtcdConfig(username="u", password_file="/p"), ["a:1"])


def test_hosts_that_hold_no_replica_are_refused() -> None:
    with pytest.raises(CheckFailed, match="1 replicas of 4 ranks need more than the 2 devices of 2 hosts"):
        fit_to_hosts(config(tensor_parallel_size=4), part(0, 2), "10.0.0.1", 1)
