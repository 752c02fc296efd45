"""Locks that keep two daemons off one device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from controlplane.runtime.ids import ClusterId, NodeId
from dataplane import devices
from dataplane.devices import describe, held_by_others, lock_path, parse_devices
from dataplane.zygote import hold_device

CLUSTER = ClusterId("c")
NODE = NodeId("n")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERDURE_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that shows two GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_NVIDIA", tmp_path / "gpus")
    for index in range(2):
        card = tmp_path / "gpus" / f"0000:0{index}:00.0"
        card.mkdir(parents=True)
        (card / "information").write_text(f"Model: \t\t Card {index}\nIRQ: 1\n")


def test_a_gpu_is_one_on_a_host_and_a_cpu_share_its_nodes_own() -> None:
    other = NodeId("other")
    assert lock_path(CLUSTER, NODE, "cpu:0") != lock_path(CLUSTER, other, "cpu:0")
    assert lock_path(CLUSTER, NODE, "cpu:0") != lock_path(ClusterId("d"), NODE, "cpu:0")
    assert lock_path(CLUSTER, NODE, "cuda:0") == lock_path(ClusterId("d"), other, "cuda:0")


@pytest.mark.usefixtures("gpus")
def test_a_gpu_goes_by_its_place_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    second = lock_path(CLUSTER, NODE, "cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert lock_path(CLUSTER, NODE, "cuda:0") == second
    assert parse_devices("auto") == ("cuda:0",)
    assert [device.name for device in describe(("cuda:0",))] == ["Card 1"]


@pytest.mark.usefixtures("gpus")
def test_auto_takes_every_gpu() -> None:
    assert parse_devices("auto") == ("cuda:0", "cuda:1")


def test_auto_without_a_gpu_is_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_NVIDIA", tmp_path / "none")
    assert parse_devices("auto") == ("cpu:0",)


def test_a_held_device_is_seen_and_its_holder_named() -> None:
    path = lock_path(CLUSTER, NODE, "cpu:0")
    assert held_by_others(CLUSTER, NODE, ("cpu:0", "cpu:1")) == []
    descriptor = hold_device(str(path), 0)
    assert descriptor is not None
    try:
        (held,) = held_by_others(CLUSTER, NODE, ("cpu:0", "cpu:1"))
        assert (held.device, held.holder) == ("cpu:0", str(os.getpid()))
        assert hold_device(str(path), 0.05) is None, "nobody else gets it"
    finally:
        os.close(descriptor)
    assert held_by_others(CLUSTER, NODE, ("cpu:0",)) == []
