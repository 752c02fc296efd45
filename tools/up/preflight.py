"""Everything that would make a local cluster fail, looked at before a process is started.

Each check returns one clear line that names what is wrong, or nothing.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

from controlplane.config import ClusterConfig

RANK_OVERHEAD_BYTES = 500 * 2**20
"""What a rank holds beside weights and KV cache: torch, transformers and buffers."""

CPU_WEIGHT_COPIES = 2
"""A CPU rank keeps each matrix as stored and packed for its kernels."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
CGROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Folder, limit, usage and reclaimable part, of cgroup v2 and v1."""

HEADER_BYTES_MAX = 100 * 2**20


def missing_packages() -> list[str]:
    """Complaints about an installation that can run no worker."""
    lacking = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if not lacking:
        return []
    return [f"not installed: {', '.join(lacking)} (workers need them: pip install 'perdure[worker]')"]


def busy_ports(config: ClusterConfig) -> list[str]:
    """Complaints about ports that another process listens on."""
    wanted = [(f"gateway {process.name}", process.host, process.http_port) for process in config.cluster.controlplanes]
    wanted += [
        (f"control plane {process.name}", process.host, process.port) for process in config.cluster.controlplanes
    ]
    wanted += [(f"worker {node.name}", node.host, port) for node in config.cluster.nodes for port in node.ports[:1]]
    return [complaint for part, host, port in wanted if (complaint := busy_port(part, host, port))]


def busy_port(part: str, host: str, port: int) -> str | None:
    """Why `part` cannot listen on host:port, or None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} for {part} is busy: {port_owner(port)} listens on it (choose another with --port)"
            return f"cannot listen on {host}:{port} for {part}: {error.strerror}"
    return None


def port_owner(port: int) -> str:
    """Who listens on `port`: "pid 12 (python -m http.server)", as far as /proc lets us see."""
    inodes = {f"socket:[{inode}]" for table in ("tcp", "tcp6") for inode in _listening_inodes(table, port)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(entry) in inodes for entry in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"pid {process.name} ({words[:80]})"
        except OSError:
            # Another user's process, or one that has just ended.
            continue
    return "a process that we cannot see"


def _listening_inodes(table: str, port: int) -> list[str]:
    try:
        lines = (Path("/proc/net") / table).read_text().splitlines()[1:]
    except OSError:
        return []
    rows = [line.split() for line in lines]
    # Columns of proc(5): local address in hex, state (0A: listening), inode.
    return [row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port]


def missing_model(path: Path) -> list[str]:
    """Complaints about a model folder that cannot be served."""
    if not path.exists():
        return [f"model {path} does not exist"]
    if not path.is_dir():
        return [f"model {path} is not a folder in Hugging Face form (config.json, *.safetensors, tokenizer.json)"]
    if not os.access(path, os.R_OK | os.X_OK):
        return [f"model folder {path} is not readable"]
    try:
        json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        return [f"model folder {path} has no config.json"]
    except (OSError, ValueError) as error:
        return [f"{path / 'config.json'} cannot be read: {error}"]
    unreadable = [file for file in weight_files(path) if not os.access(file, os.R_OK)]
    return [f"{file} is not readable" for file in unreadable]


def missing_weights(path: Path) -> list[str]:
    """The complaint about a model folder without weights."""
    return [] if weight_files(path) else [f"model folder {path} has no *.safetensors"]


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def too_little_memory(config: ClusterConfig, model: Path, replicas_here: int) -> list[str]:
    """The complaint when `replicas_here` cannot fit into this machine's free memory (CPU) or its GPUs' (CUDA)."""
    weights = weight_bytes(model, config.model.dtype)
    on_cuda = any(device.startswith("cuda") for node in config.cluster.nodes for device in node.devices)
    if on_cuda:
        each, free = weights // config.ranks_per_replica, min(cuda_free_bytes(), default=None)
        if free is None or each <= free * config.model.mem_fraction_static:
            return []
        return [f"each rank needs {_gib(each)} GiB for weights of {model}, but a GPU has only {_gib(free)} GiB free"]
    needed = replicas_here * (CPU_WEIGHT_COPIES * weights + config.ranks_per_replica * RANK_OVERHEAD_BYTES)
    free = available_memory_bytes()
    if needed <= free:
        return []
    return [
        f"{replicas_here} replicas of {model} need about {_gib(needed)} GiB, but only {_gib(free)} GiB of memory "
        "are free (fewer with --workers, or a smaller --dtype)"
    ]


def weight_bytes(model: Path, dtype: str) -> int:
    """Bytes of a model's weights as loaded: stored sizes, scaled to `dtype` unless that is "auto"."""
    return sum(_file_weight_bytes(file, DTYPE_BYTES.get(dtype)) for file in weight_files(model))


def _file_weight_bytes(file: Path, element_bytes: int | None) -> int:
    """From the header of a safetensors file: a length (u64, little endian), then JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(min(length, HEADER_BYTES_MAX)))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            stored_bytes = STORED_BYTES.get(tensor["dtype"])
            scale = element_bytes / stored_bytes if element_bytes and stored_bytes else 1
            total += round((end - begin) * scale)
    return total


def available_memory_bytes() -> int:
    """Memory that new processes can take: what the kernel calls available, or less where a cgroup caps us."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *(cgroup_free_bytes(Path("/sys/fs/cgroup"), names) for names in CGROUP_FILES)])


def cgroup_free_bytes(root: Path, names: tuple[str, str, str, str]) -> int:
    """What a cgroup still lets its processes take; very much where it sets no limit."""
    folder, limit, usage, reclaimable = names
    try:
        cap = (root / folder / limit).read_text().strip()
        used = int((root / folder / usage).read_text())
        stat = dict(line.split() for line in (root / folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return sys.maxsize
    # Page cache counts as usage but is given back at once.
    return max(0, int(cap) - used + int(stat.get(reclaimable, 0))) if cap.isdigit() else sys.maxsize


def cuda_free_bytes() -> list[int]:
    """Free memory of each GPU, as nvidia-smi sees it; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) * 2**20 for line in answer.stdout.split() if line.isdigit()]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
