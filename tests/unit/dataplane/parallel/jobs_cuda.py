"""What the ranks of the tests over several GPUs do. Each function runs on every rank; see tests/support/ranks.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from controlplane.runtime.errors import PeerLost
from dataplane.parallel.device_board import slot_bytes
from dataplane.parallel.groups import Group
from tests.support.ranks import Ranks

SIZES = (1, 7, 640, 4096, 4097, 100_003, 524_288)
"""Elements: one, parts of a part, a whole one, many."""


def board_sums(ranks: Ranks) -> dict[str, Any]:
    """Sums over the board against those of what NCCL gathers, mixed in size and type."""
    group = ranks.mesh(kind="cuda", tensor=ranks.size).tensor
    board = _board(group)
    device = ranks.device("cuda")
    draw = torch.Generator(device).manual_seed(ranks.rank)
    wrong, bits = [], []
    for turn in range(3):
        for size in SIZES[turn:] + SIZES[:turn]:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                x = torch.randn(size, generator=draw, device=device).to(dtype)
                if not board.fits(x):
                    continue
                parts = group.all_gather(x)
                total = board.sum(x)
                if not torch.equal(total, _added(parts)):
                    wrong.append([size, str(dtype)])
                bits.append(float(total.double().sum()))
    too_large = torch.empty(slot_bytes(ranks.size) // 4 + 1, device=device)
    return {"wrong": wrong, "bits": bits, "fits": [board.fits(too_large), board.fits(too_large[:-1])]}


def captured_sums(ranks: Ranks) -> int:
    """A captured chain of sums, replayed with ranks that dawdle: how many results were wrong."""
    group = ranks.mesh(kind="cuda", tensor=ranks.size).tensor
    x = torch.zeros(5000, device=ranks.device("cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = x
        for _ in range(5):
            y = group.all_reduce(y) / ranks.size + 1
    wrong = 0
    for turn in range(400):
        if turn % (37 + ranks.rank) == 0:
            time.sleep(0.002)
        x.fill_(turn + ranks.rank)
        graph.replay()
        expected = turn + sum(range(ranks.size)) / ranks.size + 5
        wrong += int((y != expected).any())
    return wrong


def stuck(ranks: Ranks, how: str) -> list[Any]:
    """Rank 0 waits on its GPU for a rank that never comes, is aborted from a second thread as by its daemon, and forms
    the next epoch, in which sums are right."""
    mesh = ranks.mesh(timeout_s=60, kind="cuda", tensor=ranks.size)
    device = ranks.device("cuda")
    launch = _launch(how, mesh.tensor, torch.ones(1000, device=device))
    outcome: list[Any] = []
    if ranks.rank == 0:
        launch()
        threading.Timer(0.5, mesh.abort).start()
        begun = time.monotonic()
        torch.cuda.synchronize(device)
        took = time.monotonic() - begun
        try:
            mesh.check()
        except PeerLost as error:
            outcome = [error.reason.group, 0.3 < took < 5]
    else:
        time.sleep(2)
        mesh.abort()
    mesh.close()
    after = ranks.mesh(kind="cuda", tensor=ranks.size).tensor
    return [*outcome, float(after.all_reduce(torch.ones(1, device=device)))]


def _launch(how: str, group: Group, x: Tensor) -> Callable[[], object]:
    if how == "nccl":
        assert group.transport is not None
        group.transport.device_board = None
    # Once together: connections are made.
    group.all_reduce(x.clone())
    if how != "graph":
        return lambda: group.all_reduce(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        group.all_reduce(x)
        group.all_reduce(x)
    return graph.replay


def _board(group: Group) -> Any:
    assert group.transport is not None
    board = group.transport.device_board
    assert board is not None, "the GPUs of this host do not reach each other's memory"
    return board


def _added(parts: Tensor) -> Tensor:
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total.to(parts.dtype)
