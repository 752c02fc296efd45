"""A worker's flags and its part of the cluster's file; every mistake is named."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from controlplane.runtime.errors import Rejected
from dataplane.__main__ import worker_command
from dataplane.config import WorkerFlags, check_port_free, resolve

FILE = """
cluster:
  name: prod
  etcd:
    endpoints: [e1:2379, e2:2379]
    username: worker
    password_file: {password}
  nodes:
    - {{host: h1, ports: [7801], devices: ["cpu:0", "cpu:1"]}}
    - {{host: h2, name: second, devices: ["cpu:0"]}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    password = tmp_path / "password"
    password.write_text("secret\n")
    path = tmp_path / "cluster.yaml"
    path.write_text(FILE.format(password=password))
    return path


def flags(tmp_path: Path, **given: Any) -> WorkerFlags:
    return WorkerFlags(**{"etcd": "e:1", "node": "n", "devices": "cpu:0", "state_dir": tmp_path, **given})


def test_flags_alone_suffice(tmp_path: Path) -> None:
    config = resolve(flags(tmp_path, etcd="a:1, b:2", devices="cpu:0,cpu:1"))
    assert config.etcd.endpoints == ("a:1", "b:2")
    assert config.devices == ("cpu:0", "cpu:1")
    assert (config.host, config.port) == ("127.0.0.1", 0)
    assert config.keys.prefix == "/perdure/local/"
    assert config.log_dir == tmp_path / "workers" / "n"


def test_the_file_gives_a_node_its_place(tmp_path: Path, file: Path) -> None:
    config = resolve(WorkerFlags(node="h1", config=file, state_dir=tmp_path))
    assert (config.host, config.port, config.devices) == ("h1", 7801, ("cpu:0", "cpu:1"))
    assert config.etcd.endpoints == ("e1:2379", "e2:2379")
    assert (config.etcd.user, config.etcd.password) == ("worker", "secret")
    assert config.keys.cluster_name == "prod"


def test_cores_are_shared_with_the_other_nodes_of_the_host(tmp_path: Path, file: Path) -> None:
    assert resolve(flags(tmp_path, devices="cpu:0,cpu:1")).cpu_ranks == 2
    assert resolve(WorkerFlags(node="h1", config=file, state_dir=tmp_path)).cpu_ranks == 2
    third = '    - {host: h1, devices: ["cpu:0", "cpu:1", "cpu:2"]}\n    - {host: h1, name: gpu, devices: [0]}\n'
    file.write_text(file.read_text() + third)
    assert resolve(WorkerFlags(node="h1-0", config=file, state_dir=tmp_path)).cpu_ranks == 5
    assert resolve(WorkerFlags(node="h1-1", config=file, state_dir=tmp_path)).cpu_ranks == 5
    assert resolve(WorkerFlags(node="second", config=file, state_dir=tmp_path)).cpu_ranks == 1


def test_flags_win_over_the_file(tmp_path: Path, file: Path) -> None:
    config = resolve(flags(tmp_path, node="second", config=file, host="0.0.0.0", port=9, cluster="other"))
    assert (config.host, config.port, config.keys.cluster_name) == ("0.0.0.0", 9, "other")
    assert config.etcd.endpoints == ("e:1",)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"node": ""}, "--node is missing"),
        ({"node": "a/b"}, "node name 'a/b'"),
        ({"etcd": ""}, "--etcd is missing"),
        ({"port": 70000}, "--port 70000 is no port"),
        ({"metrics_port": -1}, "--metrics-port -1 is no port"),
        ({"devices": "tpu:0"}, "device 'tpu:0': write cpu:N or cuda:N"),
        ({"devices": "cpu:0,cpu:0"}, "give distinct devices"),
        ({"devices": "cuda:99"}, "cuda:99 not found"),
        ({"config": Path("/nowhere.yaml")}, "--config /nowhere.yaml: No such file"),
        ({"etcd_ca": Path("/nowhere.pem")}, "--etcd-ca /nowhere.pem: No such file"),
        ({"state_dir": Path("/dev/null/state")}, "--state-dir /dev/null/state"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path: Path, wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(Rejected, match=text.replace("(", r"\(")):
        resolve(flags(tmp_path, **wrong))


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ("cluster: [", "while parsing"),
        ("[]", "must be a mapping"),
        ("cluster: {nodes: 3}", "cluster.nodes must be a list"),
        ("cluster: {nodes: [{name: other}]}", "'n' is not in .*, which has other"),
        ("cluster: {nodes: [{name: n, ports: [seven]}]}", "--port 'seven' is no port"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, document: str, text: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(document)
    with pytest.raises(Rejected, match=text):
        resolve(flags(tmp_path, config=path))


def test_a_taken_port_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(Rejected, match=f"--port 127.0.0.1:{port} cannot be listened on"):
            check_port_free("127.0.0.1", port, "--port")


def test_the_command_says_one_line_and_fails() -> None:
    app = Typer()
    app.command()(worker_command)
    result = CliRunner().invoke(app, ["--node", "n"])
    assert result.exit_code == 2
    assert (
        result.stderr.strip()
        == "perdure worker: --etcd is missing: host:port of etcd, several with commas between them"
    )
