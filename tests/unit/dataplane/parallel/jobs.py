"""What the ranks of the collective tests do. Each function runs on every rank; see tests/support/ranks.py."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from controlplane.runtime.errors import PeerLost
from dataplane.parallel.collectives import all_gather_data, all_reduce_many, broadcast_data, reduce_data
from dataplane.parallel.data import average_gradients, gather_data, gather_rows, scatter_data, scatter_rows
from dataplane.parallel.groups import MAX, MEAN, MIN, SUM, Group
from dataplane.parallel.pipeline import StageLink
from dataplane.parallel.shared_memory import SLOT_BYTES
from dataplane.parallel.tensor import RowParallelLinear
from tests.support.ranks import Ranks

SMALL, LARGE = 7, SLOT_BYTES
"""Elements: through the board, and past it."""


def exchange(ranks: Ranks, kind: str = "cpu") -> dict[str, Any]:
    """Every primitive, small and large, on one group."""
    group = ranks.mesh(tensor=ranks.size, kind=kind).tensor
    device = ranks.device(kind)
    results: dict[str, Any] = {"board": group.transport is not None and group.transport.board is not None}
    for name, count in (("small", SMALL), ("large", LARGE)):
        for operation in (SUM, MEAN, MAX, MIN):
            for dtype in (torch.float32, torch.bfloat16, torch.int64):
                if operation == MEAN and dtype == torch.int64:
                    continue
                x = torch.full((count,), ranks.rank + 1, device=device).to(dtype)
                key = f"{name} {operation} {dtype}"
                results[key] = sorted(set(group.all_reduce(x, operation).tolist()))
        gathered = group.all_gather(torch.full((count, 2), ranks.rank, device=device))
        results[f"{name} all_gather"] = [gathered.shape[0], [int(part.unique()) for part in gathered]]
        x = torch.full((count,), float(ranks.rank), device=device)
        results[f"{name} broadcast"] = float(group.broadcast(x, 1).mean())
        reduced = group.reduce(torch.full((count,), float(ranks.rank), device=device), 1)
        results[f"{name} reduce"] = float(reduced.mean()) if ranks.rank == 1 else None
    group.barrier()
    results["costs"] = {kind: [cost.calls, cost.bytes > 0] for kind, cost in group.costs.items()}
    return results


def plain_data(ranks: Ranks) -> dict[str, Any]:
    group = ranks.mesh(tensor=ranks.size).control
    long = "x" * 200_000
    return {
        "broadcast": broadcast_data(group, {"from": ranks.rank, "ids": [1, 2]}, 1),
        "long": len(broadcast_data(group, long if ranks.rank == 0 else None, 0)),
        "gather": all_gather_data(group, ["rank", ranks.rank] * (ranks.rank + 1)),
        "sum": reduce_data(group, {"loss": 0.5, "tokens": [ranks.rank, 1]}),
        "mean": reduce_data(group, ranks.rank, MEAN),
        "max to 0": reduce_data(group, ranks.rank, MAX, to=0),
        "many": [part.tolist() for part in all_reduce_many(group, [torch.ones(2), torch.ones(3, dtype=torch.int64)])],
    }


def sums_are_the_same_bits(ranks: Ranks) -> list[int]:
    """Rounded sums, as raw bits."""
    group = ranks.mesh(tensor=ranks.size).tensor
    x = torch.randn(1000, generator=torch.Generator().manual_seed(ranks.rank))
    return group.all_reduce(x).view(torch.int32).tolist()


def sums_by_pieces(ranks: Ranks, kind: str = "cpu") -> dict[str, Any]:
    """A product whose pieces are summed as they come, against one whose result is summed as a whole: the largest
    difference by number of rows, and how many exchanges each took."""
    group = ranks.mesh(tensor=ranks.size, kind=kind).tensor
    device = ranks.device(kind)
    told: dict[str, Any] = {}
    # Whole numbers: every order of adding gives the same sum.
    draw = torch.Generator().manual_seed(ranks.rank)
    weight = torch.randint(-3, 4, (2048, 64), generator=draw).float().to(device)
    bias = torch.ones(2048, device=device)
    whole, by_pieces = (RowParallelLinear(weight, bias, group) for _ in range(2))
    by_pieces.matmul_into = lambda x, weight, y: torch.mm(x, weight.t(), out=y)
    for rows in (1, 1024, 2047, 3000, 9001):
        x = torch.randint(-3, 4, (1, rows, 64), generator=draw).float().to(device)
        before = group.costs["all_reduce"].calls if group.costs else 0
        wanted, between = whole(x), group.costs["all_reduce"].calls
        result, after = by_pieces(x), group.costs["all_reduce"].calls
        told[str(rows)] = [float((result - wanted).abs().max()), between - before, after - between]
    return told


def lost_under_way(ranks: Ranks) -> list[str]:
    """What a rank is told that waits for a sum in which another, which leaves, has no part."""
    group = ranks.mesh(tensor=ranks.size).tensor
    group.barrier()
    if ranks.rank:
        group.end_waits()
        return []
    begun = group.begin_sum(torch.ones(SLOT_BYTES))
    try:
        begun.wait()
    except PeerLost as error:
        return [error.reason.group, str(error.reason.collective), error.reason.text.partition(":")[0]]
    return ["summed"]


def many_exchanges(ranks: Ranks) -> int:
    """Exchanges whose order and parity vary, with ranks that dawdle: how many results were wrong."""
    group = ranks.mesh(tensor=ranks.size).tensor
    wrong = 0
    for number in range(3000):
        if number % (37 + ranks.rank) == 0:
            time.sleep(0.0005)
        value = torch.full((1 + number % 50,), number + ranks.rank)
        if number % 3 == 0:
            source = number % ranks.size
            wrong += int((group.broadcast(value, source) != number + source).any())
        else:
            expected = sum(number + rank for rank in range(ranks.size))
            wrong += int((group.all_reduce(value) != expected).any())
    return wrong


def stuck(ranks: Ranks, board: bool) -> list[Any]:
    """Rank 0 waits for a rank that never comes, is aborted from a second thread, and forms the next epoch."""
    mesh = ranks.mesh(timeout_s=60, tensor=2)
    assert mesh.tensor.transport is not None
    if not board:
        mesh.tensor.transport.board = None
    outcome: list[Any] = []
    if ranks.rank == 0:
        threading.Timer(0.3, mesh.abort).start()
        begun = time.monotonic()
        try:
            mesh.tensor.all_reduce(torch.ones(3))
        except PeerLost as error:
            outcome = [error.reason.group, "aborted" in error.reason.text, time.monotonic() - begun < 5]
    else:
        time.sleep(1)
    mesh.close()
    after = ranks.mesh(tensor=2).tensor
    return [*outcome, float(after.all_reduce(torch.ones(1)))]


def late(ranks: Ranks, board: bool) -> list[Any]:
    """Rank 0's exchange meets its deadline."""
    mesh = ranks.mesh(timeout_s=0.5, tensor=2)
    assert mesh.tensor.transport is not None
    if not board:
        mesh.tensor.transport.board = None
    if ranks.rank == 1:
        time.sleep(1.5)
        return []
    try:
        mesh.tensor.all_reduce(torch.ones(3))
    except PeerLost as error:
        return [error.reason.group, error.reason.collective, error.reason.text]
    return []


def epochs(ranks: Ranks) -> list[float]:
    """Five lives in one process, of several shapes."""
    results = []
    for degrees in ({"tensor": 2, "pipeline": 2}, {"tensor": 4}, {"pipeline": 4}, {"data": 2, "tensor": 2}, {}):
        mesh = ranks.mesh(**degrees) if degrees else ranks.mesh(data=4)
        results += [float(group.all_reduce(torch.tensor(float(ranks.rank)))) for group in mesh.groups]
        mesh.close()
    return results


def point_to_point(ranks: Ranks) -> list[float]:
    """Each rank sends to the next of the pipeline; rows travel by all_to_all."""
    group: Group = ranks.mesh(pipeline=ranks.size).pipeline
    x = torch.full((3,), float(ranks.rank))
    sent = group.send(x, (group.index + 1) % group.size)
    got = group.receive(torch.empty(3), (group.index - 1) % group.size)
    sent.wait()
    rows = torch.full((group.size, 1), float(ranks.rank))
    spread = group.all_to_all(rows, [1] * group.size, [1] * group.size)
    return [float(got[0]), *spread.flatten().tolist()]


def spread_batch(ranks: Ranks) -> dict[str, Any]:
    group = ranks.mesh(data=ranks.size).data
    items, rows = list(range(7)), torch.arange(7.0).unsqueeze(1)
    first = ranks.rank == 0
    part: list[int] = scatter_data(group, items if first else None)
    mine = scatter_rows(group, rows if first else None, rows)
    gradients = [torch.full((2,), float(ranks.rank)), torch.full((1,), 2.0)]
    return {
        "part": part,
        "rows": mine.flatten().tolist(),
        "gathered": gather_data(group, [item * 10 for item in part]),
        "gathered rows": gather_rows(group, mine * 10).flatten().tolist(),
        "gradients": [item.tolist() for item in average_gradients(group, gradients)],
    }


def spread_few(ranks: Ranks) -> list[str]:
    return scatter_data(ranks.mesh(data=ranks.size).data, ["only"] if ranks.rank == 0 else None)


def micro_batches(ranks: Ranks) -> list[list[float]]:
    """Four micro-batches under way at once; each stage adds its part, the last one's "tokens" return to the first."""
    mesh = ranks.mesh(pipeline=ranks.size)
    link = StageLink(mesh.pipeline, 2, torch.float32, torch.device("cpu"))
    sizes = [1, 2, 3, 4]
    sampled: list[torch.Tensor] = []
    for size in sizes:
        hidden_TH = torch.full((size, 2), float(size)) if mesh.is_first_stage else link.receive_hidden(size)
        if not mesh.is_first_stage:
            hidden_TH = hidden_TH + size
        if mesh.is_last_stage:
            sampled.append(link.return_tokens(hidden_TH[:, 0].long(), size))
        else:
            link.send_hidden(hidden_TH)
    if mesh.is_first_stage:
        sampled = [link.return_tokens(None, size) for size in sizes]
    link.drain()
    return [item.float().tolist() for item in sampled]
