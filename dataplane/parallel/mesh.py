"""The mesh: one object owns all parallel degrees of a replica, and is the only source of process groups.

Ranks count with the tensor axis fastest, then pipeline, then data. Experts lie across the tensor ranks: `expert` ways,
each way's experts cut over the remaining tensor / expert ranks.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog
import torch
from torch._C import _distributed_c10d

from controlplane.runtime.errors import PeerLost, invalid
from controlplane.runtime.messages.common import ParallelDegrees, Reason, ReasonKind
from dataplane.parallel.device_board import DeviceBoard, identify, is_reachable
from dataplane.parallel.groups import Cost, Group, Pulse, Transport
from dataplane.parallel.shared_memory import FOLDER, Board, create_board, is_supported
from dataplane.parallel.sockets import Connections, open_sockets
from dataplane.progress import ProgressPage

dist: Any = _distributed_c10d
"""Its C++ bindings have no types."""

_log = structlog.get_logger()


def world_size(degrees: ParallelDegrees) -> int:
    """Ranks of a mesh. Raises Rejected for degrees that no mesh can have."""
    for name in ("tensor", "pipeline", "data", "expert"):
        if getattr(degrees, name) < 1:
            raise invalid(f"the {name} degree must be at least 1, not {getattr(degrees, name)}")
    if degrees.tensor % degrees.expert:
        raise invalid(
            f"experts lie across the tensor ranks: the expert degree {degrees.expert} must divide the tensor degree "
            f"{degrees.tensor}"
        )
    return degrees.tensor * degrees.pipeline * degrees.data


@dataclass(slots=True)
class Mesh:
    """This rank's place and its groups.

    `world` holds every rank of all replicas, `data` one rank of each. `control` holds the ranks of this replica, its
    driver first, and stays on the host, for plain data, whatever the device.
    """

    degrees: ParallelDegrees
    rank: int
    control: Group
    world: Group
    tensor: Group
    pipeline: Group
    data: Group

    @classmethod
    def single(cls) -> Mesh:
        """A mesh of one rank."""
        return plan_mesh(ParallelDegrees(), 0)

    @property
    def is_driver(self) -> bool:
        """Whether this rank plans the steps of its replica."""
        return self.control.index == 0

    @property
    def tensor_rank(self) -> int:
        return self.tensor.index

    @property
    def stage(self) -> int:
        return self.pipeline.index

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.index == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.index == self.pipeline.size - 1

    @property
    def expert_rank(self) -> int:
        """Which of the `expert` ways lies here."""
        return self.tensor.index // (self.tensor.size // self.degrees.expert)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.control, self.world, self.tensor, self.pipeline, self.data)

    def group(self, name: str) -> Group:
        """The group called `name`: control, world, tensor, pipeline or data."""
        return next(group for group in self.groups if group.name == name)

    def costs(self) -> dict[str, dict[str, Cost]]:
        """What each kind of exchange has cost, by group and kind."""
        return {group.name: group.costs for group in self.groups if group.costs}

    def abort(self) -> None:
        """End every group: who is stuck in one gets a PeerLost. From any thread."""
        for group in self.groups:
            group.end_waits()
        # At once: each one's abort waits for kernels of the others, which end by their own.
        on_gpu = [group for group in self.groups if group.device == "cuda"]
        aborts = [threading.Thread(target=group.abort_backend) for group in on_gpu]
        for thread in aborts:
            thread.start()
        for thread in aborts:
            thread.join()

    def check(self) -> None:
        """Raise PeerLost if the mesh was aborted (Group.check)."""
        self.tensor.check()

    def close(self) -> None:
        """Let go of all groups, after their last exchange or an abort."""
        for group in self.groups:
            group.close()


def plan_mesh(degrees: ParallelDegrees, rank: int, pulse: Pulse | None = None) -> Mesh:
    """The mesh as `rank` sees it, without connections. Raises Rejected."""
    size = world_size(degrees)
    if not 0 <= rank < size:
        raise invalid(f"rank {rank} is outside a mesh of {size} ranks")
    t, p = degrees.tensor, degrees.pipeline
    replica = rank // (t * p)
    axes = {
        "control": range(replica * t * p, (replica + 1) * t * p),
        "world": range(size),
        "tensor": range(rank // t * t, rank // t * t + t),
        "pipeline": range(replica * t * p + rank % t, (replica + 1) * t * p, t),
        "data": range(rank % (t * p), size, t * p),
    }
    pulse = pulse or Pulse()
    groups = {name: Group(name, tuple(ranks), ranks.index(rank), pulse=pulse) for name, ranks in axes.items()}
    return Mesh(degrees=degrees, rank=rank, **groups)


@dataclass(slots=True)
class Rendezvous:
    """Where the ranks of an epoch meet: a key-value store that rank 0 holds. Old epochs use other keys."""

    store: Any
    address: str

    @classmethod
    def listen(cls, host: str, port: int = 0) -> Rendezvous:
        """Rank 0: hold the store on `port` of `host`; 0: a free one."""
        store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
        return cls(store, f"{host}:{store.port}")

    @classmethod
    def join(cls, address: str, deadline: float) -> Rendezvous:
        """Any other rank, until `deadline` (time.monotonic). Raises PeerLost."""
        host, _, port = address.rpartition(":")
        try:
            store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_left(deadline))
        except (RuntimeError, ValueError) as error:
            raise _unformed(f"no rendezvous at {address}: {error}") from error
        return cls(store, address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Formation:
    """What every rank of an epoch must agree on to form its mesh."""

    degrees: ParallelDegrees
    # By rank: the host part each rank is reached at; equal hosts share memory.
    hosts: tuple[str, ...]
    # Drawn for this epoch: who comes with another one meets nobody.
    nonce: str
    epoch: int
    # "gloo" or "nccl".
    backend: str
    collective_timeout_s: float


def form_mesh(
    formation: Formation,
    rank: int,
    device: torch.device,
    rendezvous: Rendezvous,
    deadline: float,
    page: ProgressPage | None = None,
) -> Mesh:
    """Connect the groups of `rank`, together with all other ranks, until `deadline` (time.monotonic).

    Raises PeerLost when somebody does not come; nothing is left connected then.
    """
    mesh = plan_mesh(formation.degrees, rank, Pulse(page))
    if len(formation.hosts) != mesh.world.size:
        raise invalid(f"{len(formation.hosts)} ranks were given for a mesh of {mesh.world.size}")
    try:
        for group in mesh.groups:
            if group.size > 1:
                backend = "gloo" if group.name == "control" else formation.backend
                group.transport = _connect(group, formation, rank, backend, device, rendezvous, deadline)
    except RuntimeError as error:
        mesh.abort()
        mesh.close()
        raise _unformed(f"epoch {formation.epoch} of {mesh.world.size} ranks could not form: {error}") from error
    return mesh


def _connect(
    group: Group,
    formation: Formation,
    rank: int,
    backend: str,
    device: torch.device,
    rendezvous: Rendezvous,
    deadline: float,
) -> Transport:
    # The lowest rank tells groups of one axis apart.
    prefix = f"{formation.nonce}/{formation.epoch}/{group.name}.{group.ranks[0]}"
    store = dist.PrefixStore(prefix, rendezvous.store)
    store.set_timeout(_left(deadline))
    before = open_sockets()
    host = formation.hosts[rank]
    make = _nccl if backend == "nccl" else _gloo
    process_group = make(store, group, host, device, deadline)
    transport = Transport(process_group, formation.collective_timeout_s)
    on_one_host = len({formation.hosts[member] for member in group.ranks}) == 1
    if backend == "gloo":
        transport.connections = Connections(before, int(rendezvous.address.rpartition(":")[2]))
        transport.board = _share_board(store, group, prefix) if on_one_host else None
        process_group.set_timeout(timedelta(seconds=formation.collective_timeout_s))
    elif on_one_host and group.name == "tensor":
        transport.device_board = _share_device_board(store, group, prefix, device)
    return transport


def _gloo(store: Any, group: Group, host: str, device: torch.device, deadline: float) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = _left(deadline)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, group.index, group.size, options)


def _nccl(store: Any, group: Group, host: str, device: torch.device, deadline: float) -> Any:
    os.environ.update(_NCCL_WATCH)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _left(deadline)
    process_group = dist.ProcessGroupNCCL(store, group.index, group.size, options)
    process_group.eager_connect_single_device(device)
    return process_group


_NCCL_WATCH = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""torch's own watch over NCCL ends the process when a peer is lost or late. Here the daemon judges (PROTOCOL §6), and
the process and its weights outlive the group."""


def _share_device_board(store: Any, group: Group, prefix: str, device: torch.device) -> DeviceBoard | None:
    """A board for GPUs of one host; None, on every rank, where one of them cannot reach the others' memory."""
    store.set(f"gpu.{group.index}", identify(device))
    identities = [store.get(f"gpu.{index}").decode() for index in range(group.size)]
    if not _all_agree(store, group, "reach", is_reachable(identities, device)):
        return None
    try:
        board = DeviceBoard(dist.PrefixStore("device_board", store), prefix, group.index, group.size, device)
    except RuntimeError as error:
        _log.warning("memory_not_shared", group=group.name, device=str(device), error=str(error))
        board = None
    return board if _all_agree(store, group, "shared", board is not None) else None


def _all_agree(store: Any, group: Group, question: str, answer: bool) -> bool:
    store.set(f"{question}.{group.index}", "yes" if answer else "no")
    return all(store.get(f"{question}.{index}") == b"yes" for index in range(group.size))


def _share_board(store: Any, group: Group, prefix: str) -> Board | None:
    """A board for ranks of one host; None, on every rank, where one of them cannot reach the others' memory."""
    path = FOLDER / ("perdure-" + prefix.replace("/", "-"))
    if group.index == 0:
        if is_supported():
            path.unlink(missing_ok=True)
            create_board(path, group.size)
        store.set("board", "made")
    store.wait(["board"])
    board = _open_board(path, group)
    agreed = _all_agree(store, group, "board", board is not None)
    if group.index == 0:
        path.unlink(missing_ok=True)
    return board if agreed else None


def _open_board(path: Path, group: Group) -> Board | None:
    try:
        return Board(path, group.size, group.index) if is_supported() else None
    except OSError:
        return None


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))


def _unformed(text: str) -> PeerLost:
    return PeerLost(Reason(kind=ReasonKind.GROUP_FAILED, text=text))
