"""A node's devices: which there are, what they are called host-wide, and the locks that keep two daemons apart."""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

from controlplane.runtime.errors import invalid
from controlplane.runtime.ids import ClusterId, NodeId
from controlplane.runtime.messages.common import Device

CPU_RANKS = "PERDURE_CPU_RANKS"
"""Variable in a rank's environment: how many ranks share this host's cores, those of its other daemons too."""

_NAME = re.compile(r"(cpu|cuda):(\d+)")
_NVIDIA = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Held:
    """A device that another process holds."""

    device: str
    # Process id as the holder wrote it; "" if it wrote none.
    holder: str


def runtime_dir() -> Path:
    """Sockets, pages and device locks of all daemons of this user. PERDURE_RUNTIME_DIR moves it; XDG_RUNTIME_DIR does
    not, for it differs between a user's login and a service, and the locks must be the same for both."""
    configured = os.environ.get("PERDURE_RUNTIME_DIR")
    return Path(configured) if configured else Path("/tmp") / f"perdure-{os.getuid()}"


def lock_path(cluster: ClusterId, node: NodeId, device: str) -> Path:
    """The file whose lock is the device. A GPU has one name on a host; a share of the CPU belongs to a cluster's node,
    for two clusters of one machine may call their nodes alike."""
    folder = runtime_dir() / "devices"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    kind, index = _parse(device)
    name = f"cuda-{_physical(index)}" if kind == "cuda" else f"{cluster}-{node}-cpu-{index}"
    return folder / name


def held_by_others(cluster: ClusterId, node: NodeId, devices: tuple[str, ...]) -> list[Held]:
    """The devices that some process holds now. A look, not a hold: ranks take the locks."""
    held: list[Held] = []
    for device in devices:
        descriptor = os.open(lock_path(cluster, node, device), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.append(Held(device, os.pread(descriptor, 32, 0).decode(errors="replace")))
        finally:
            os.close(descriptor)
    return held


def parse_devices(text: str) -> tuple[str, ...]:
    """Device names from "cpu:0,cpu:1", "cuda:0" or "auto" (all GPUs, or one share of the CPU). Raises Rejected."""
    if text == "auto":
        count = len(_visible())
        return tuple(f"cuda:{index}" for index in range(count)) or ("cpu:0",)
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        _parse(name)
    if not names or len(set(names)) < len(names):
        raise invalid(f"--devices {text!r}: give distinct devices such as cpu:0,cpu:1 or cuda:0")
    visible = len(_visible())
    missing = [name for name in names if name.startswith("cuda:") and int(name[5:]) >= visible]
    if missing:
        raise invalid(f"--devices: {', '.join(missing)} not found, this host shows {visible} CUDA devices")
    return names


def describe(names: tuple[str, ...]) -> tuple[Device, ...]:
    """The devices with what is known of them without touching them."""
    return tuple(_describe(name, len(names)) for name in names)


def gpus(names: tuple[str, ...]) -> dict[str, str]:
    """The GPUs among the devices, each with the index or UUID by which the driver knows it."""
    parsed = {name: _parse(name) for name in names}
    return {name: _physical(index) for name, (kind, index) in parsed.items() if kind == "cuda"}


def _describe(name: str, ranks: int) -> Device:
    kind, index = _parse(name)
    if kind == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(id=name, name=_cpu_model(), memory_bytes=memory // ranks)
    return Device(id=name, name=_gpu_model(_visible()[index]))


def _parse(name: str) -> tuple[str, int]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise invalid(f"device {name!r}: write cpu:N or cuda:N")
    return match[1], int(match[2])


def _visible() -> list[str]:
    """What CUDA counts as its devices 0, 1, …: indices or UUIDs."""
    if not _NVIDIA.is_dir():
        return []
    count = sum(1 for _ in _NVIDIA.iterdir())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(count)]
    return [item.strip() for item in chosen.split(",") if item.strip() not in ("", "-1")]


def _physical(index: int) -> str:
    visible = _visible()
    return visible[index] if index < len(visible) else str(index)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _gpu_model(identity: str) -> str:
    """Read from the driver's files: asking CUDA would start a context in the daemon."""
    folders = sorted(_NVIDIA.iterdir())
    if not identity.isdigit() or int(identity) >= len(folders):
        return "CUDA device"
    lines = (folders[int(identity)] / "information").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "CUDA device")
