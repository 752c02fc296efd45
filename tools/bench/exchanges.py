"""Each exchange between ranks, as Perdure makes it and as torch.distributed does; what one rank runs and times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d

from controlplane.runtime.messages.common import ParallelDegrees
from dataplane.parallel.collectives import all_gather_data, all_reduce_many, broadcast_data
from dataplane.parallel.groups import Group
from dataplane.parallel.mesh import Formation, Rendezvous, form_mesh

HOST = "127.0.0.1"
FORM_S = 120.0
WARM_CALLS = 3
MANY = 16
"""Tensors of the exchange of many small ones."""

Exchange = Callable[[], object]

_bindings: Any = _distributed_c10d
"""Its C++ bindings have no types."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all ranks measure. `sizes`: bytes a rank brings; each is measured for about `round_s` seconds, `rounds`
    times, ours and torch's by turns."""

    ranks: int
    backend: str
    sizes: tuple[int, ...]
    rounds: int
    round_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One exchange at one size, in seconds a call: the median of each side's rounds."""

    exchange: str
    bytes: int
    ours_s: float
    torch_s: float


def measure(rank: int, plan: Plan, address: str) -> list[Row]:
    """Measure everything, together with all other ranks; every rank gets the same rows."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if plan.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deadline = time.monotonic() + FORM_S
    rendezvous = Rendezvous.join(address, deadline)
    formation = Formation(
        degrees=ParallelDegrees(tensor=plan.ranks),
        hosts=(HOST,) * plan.ranks,
        nonce=f"bench-{rendezvous.store.port}",
        epoch=1,
        backend=plan.backend,
        collective_timeout_s=FORM_S,
    )
    mesh = form_mesh(formation, rank, device, rendezvous, deadline)
    store = _bindings.PrefixStore("peer", rendezvous.store)
    dist.init_process_group(
        plan.backend, store=store, rank=rank, world_size=plan.ranks, timeout=timedelta(seconds=FORM_S)
    )
    try:
        rows = [_barrier(mesh.tensor, plan)]
        for size in plan.sizes:
            rows += [_compare(name, size, pair, mesh.tensor, plan) for name, pair in _pairs(mesh.tensor, size, device)]
    finally:
        dist.destroy_process_group()
        mesh.close()
    return rows


def _barrier(group: Group, plan: Plan) -> Row:
    return _compare("barrier", 0, (group.barrier, dist.barrier), group, plan)


def _pairs(group: Group, size: int, device: torch.device) -> list[tuple[str, tuple[Exchange, Exchange]]]:
    """By name: our call and torch's, over tensors of `size` bytes, or data that takes about as many."""
    x = torch.zeros(max(size // 4 // group.size, 1) * group.size, device=device)
    out = [torch.empty_like(x) for _ in range(group.size)]
    spread = torch.empty_like(x)
    rows = x.view(group.size, -1)
    ones = [1] * group.size
    many = [torch.zeros(max(size // 4 // MANY, 1), device=device) for _ in range(MANY)]
    data = {"ids": list(range(size // 4))}
    return [
        ("all_reduce", (lambda: group.all_reduce(x), lambda: dist.all_reduce(x))),
        ("reduce", (lambda: group.reduce(x, 0), lambda: dist.reduce(x, 0))),
        ("all_gather", (lambda: group.all_gather(x), lambda: dist.all_gather(out, x))),
        ("broadcast", (lambda: group.broadcast(x, 0), lambda: dist.broadcast(x, 0))),
        (
            "all_to_all",
            (lambda: group.all_to_all(rows, ones, ones), lambda: dist.all_to_all_single(spread, x)),
        ),
        ("send and back", (lambda: _our_ping(group, x), lambda: _torch_ping(group, x))),
        (f"{MANY} all_reduces", (lambda: all_reduce_many(group, many), lambda: [dist.all_reduce(t) for t in many])),
        ("data broadcast", (lambda: broadcast_data(group, data, 0), lambda: dist.broadcast_object_list([data], 0))),
        (
            "data all_gather",
            (lambda: all_gather_data(group, data), lambda: dist.all_gather_object([None] * group.size, data)),
        ),
    ]


def _our_ping(group: Group, x: Tensor) -> None:
    if group.index == 0:
        sent = group.send(x, 1)
        group.receive(x, 1)
        sent.wait()
    elif group.index == 1:
        group.receive(x, 0)
        group.send(x, 0).wait()


def _torch_ping(group: Group, x: Tensor) -> None:
    if group.index == 0:
        dist.send(x, 1)
        dist.recv(x, 1)
    elif group.index == 1:
        dist.recv(x, 0)
        dist.send(x, 0)


def _compare(name: str, size: int, pair: tuple[Exchange, Exchange], group: Group, plan: Plan) -> Row:
    """Both sides by turns, so that what else the machine does falls on both."""
    calls = [max(1, int(plan.round_s / _agreed(group, _time(side, WARM_CALLS, group)))) for side in pair]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(plan.rounds):
        for side, count, found in zip(pair, calls, times, strict=True):
            found.append(_agreed(group, _time(side, count, group)))
    ours, theirs = (sorted(found)[len(found) // 2] for found in times)
    return Row(name, size, ours, theirs)


def _time(side: Exchange, count: int, group: Group) -> float:
    """Seconds a call."""
    group.barrier()
    begun = time.perf_counter()
    for _ in range(count):
        side()
    if group.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


def _agreed(group: Group, seconds: float) -> float:
    """The slowest rank's."""
    slowest: Any = group.all_reduce(torch.tensor([seconds], dtype=torch.float64, device=group.device), "max")
    return float(slowest[0])
