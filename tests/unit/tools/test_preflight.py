"""Each thing that would make a start fail is named in one line."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

import pytest

from controlplane.config import ClusterConfig
from controlplane.config_source import Override
from tools.up import preflight


def write_weights(path: Path, elements: int, dtype: str = "BF16") -> None:
    size = elements * preflight.STORED_BYTES[dtype]
    header = json.dumps({"w": {"dtype": dtype, "shape": [elements], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def write_model(folder: Path, elements: int = 1000) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_weights(folder / "model.safetensors", elements)
    return folder


def test_busy_port_names_its_owner() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        complaint = preflight.busy_port("gateway cp-0", "127.0.0.1", port)
    assert complaint is not None
    assert f"port {port} for gateway cp-0 is busy: pid {os.getpid()} (" in complaint
    assert preflight.busy_port("gateway cp-0", "127.0.0.1", port) is None


def test_an_address_of_another_machine_is_no_place_to_listen() -> None:
    complaint = preflight.busy_port("gateway cp-0", "192.0.2.1", 8000)
    assert complaint == "cannot listen on 192.0.2.1:8000 for gateway cp-0: Cannot assign requested address"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    ],
)
def test_spoilt_model_folder_is_named(tmp_path: Path, spoil: object, complaint: str) -> None:
    folder = write_model(tmp_path / "model")
    assert preflight.missing_model(folder) == []
    assert callable(spoil)
    spoil(folder)
    (line,) = preflight.missing_model(folder)
    assert str(folder) in line
    assert complaint in line


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert preflight.missing_model(tmp_path / "none") == [f"model {tmp_path / 'none'} does not exist"]
    file = tmp_path / "file"
    file.touch()
    assert "is not a folder" in preflight.missing_model(file)[0]
    assert preflight.missing_weights(tmp_path) == [f"model folder {tmp_path} has no *.safetensors"]


def test_weights_are_counted_as_they_will_be_loaded(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", elements=1000)
    write_weights(folder / "more.safetensors", 10, "F32")
    assert preflight.weight_bytes(folder, "auto") == 2000 + 40
    assert preflight.weight_bytes(folder, "float32") == 4000 + 40
    assert preflight.weight_bytes(folder, "bfloat16") == 2000 + 20


def test_too_many_replicas_for_the_memory(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", elements=preflight.available_memory_bytes() // 16)
    config = ClusterConfig.from_flags({("model", "dtype"): Override("bfloat16", "--dtype")})
    assert preflight.too_little_memory(config, folder, 1) == []
    (line,) = preflight.too_little_memory(config, folder, 5)
    assert line.startswith(f"5 replicas of {folder} need about ")


def test_a_cgroup_caps_the_memory(tmp_path: Path) -> None:
    names = ("", "memory.max", "memory.current", "inactive_file")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    assert preflight.cgroup_free_bytes(tmp_path, names) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight.cgroup_free_bytes(tmp_path, names) > 2**60
    assert preflight.cgroup_free_bytes(tmp_path / "none", names) > 2**60
