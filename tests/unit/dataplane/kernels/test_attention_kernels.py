"""The attention kernels against a float64 reference, over ragged batches."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from dataplane.engine.arrangement import Runs, arrange, spare_items

pytestmark = pytest.mark.gpu

PAGE = 16


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    v_dim: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def value_dim(self) -> int:
        return self.v_dim or self.dim


SHAPES = [
    Shape(8, 2, 128),
    Shape(4, 4, 64, window=40),
    Shape(6, 2, 96, softcap=3.0),
    Shape(4, 1, 256, window=17, softcap=5.0),
    Shape(8, 8, 64, sinks=True, window=33),
    Shape(5, 1, 80, v_dim=48),
    Shape(8, 1, 16, window=12),
]

# (first position, tokens): decodes near and far, chunks with and without a prefix.
ENTRIES = [(0, 1), (700, 1), (5, 3), (0, 200), (333, 70), (15, 1), (16, 17), (1300, 1), (0, 16)]


@dataclass(frozen=True)
class Batch:
    """Queries of a step, and the whole keys and values of each entry, scattered over a poisoned cache."""

    runs: Runs
    q_THD: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    sinks_H: Tensor | None


def make_batch(shape: Shape, dtype: torch.dtype, device: torch.device, padding: int) -> Batch:
    torch.manual_seed(3)
    starts, counts = (np.array(column) for column in zip(*ENTRIES, strict=True))
    lengths = starts + counts
    blocks = -(-lengths // PAGE)
    order = list(range(int(blocks.sum()) + 3))
    random.Random(5).shuffle(order)
    table = np.array(order[: int(blocks.sum())])
    k_cache = torch.full((len(order), shape.kv_heads, PAGE, shape.dim), float("nan"))
    v_cache = torch.full((len(order), shape.kv_heads, PAGE, shape.value_dim), float("nan"))
    keys = [torch.randn(int(n), shape.kv_heads, shape.dim) for n in lengths]
    values = [torch.randn(int(n), shape.kv_heads, shape.value_dim) for n in lengths]
    first = np.cumsum(blocks) - blocks
    for entry, n in enumerate(lengths):
        for position in range(int(n)):
            block = table[first[entry] + position // PAGE]
            k_cache[block, :, position % PAGE] = keys[entry][position]
            v_cache[block, :, position % PAGE] = values[entry][position]
    rows = int(counts.sum()) + padding
    runs = Runs(starts, counts, np.cumsum(counts) - counts, first, rows)
    q_THD = torch.randn(rows, shape.heads, shape.dim)
    return Batch(
        runs,
        q_THD.to(device, dtype),
        [x.to(dtype).double() for x in keys],
        [x.to(dtype).double() for x in values],
        k_cache.to(device, dtype).flatten(1),
        v_cache.to(device, dtype).flatten(1),
        torch.from_numpy(table).to(device, torch.int32),
        torch.randn(shape.heads).to(device, dtype) if shape.sinks else None,
    )


def reference(batch: Batch, shape: Shape) -> Tensor:
    """(T, H, D_value) in float64; rows of padding are zero."""
    out = torch.zeros(batch.runs.rows, shape.heads, shape.value_dim, dtype=torch.float64)
    q_THD = batch.q_THD.double().cpu()
    for entry, (start, count) in enumerate(ENTRIES):
        rows = slice(int(batch.runs.offsets_E[entry]), int(batch.runs.offsets_E[entry]) + count)
        group = shape.heads // shape.kv_heads
        k, v = (x.repeat_interleave(group, 1) for x in (batch.keys[entry], batch.values[entry]))
        score = torch.einsum("thd,shd->hts", q_THD[rows], k) * 0.1
        if shape.softcap is not None:
            score = torch.tanh(score / shape.softcap) * shape.softcap
        distance = torch.arange(start, start + count)[:, None] - torch.arange(start + count)
        hidden = (distance < 0) | (distance >= (shape.window or 1 << 30))
        score = score.masked_fill(hidden, float("-inf"))
        if batch.sinks_H is not None:
            sink = batch.sinks_H.double().cpu().view(-1, 1, 1).expand(-1, count, 1)
            weight = torch.cat([score, sink], -1).softmax(-1)[..., :-1]
        else:
            weight = score.softmax(-1)
        out[rows] = torch.einsum("hts,shd->thd", weight, v)
    return out


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double().cpu() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch_against_float64(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    """Decodes cut into parts, chunks, and rows that only fill the step up; nothing unwritten is left or read."""
    from dataplane.kernels.decode import decode
    from dataplane.kernels.prefill import prefill, queries_a_tile

    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 product")
    batch = make_batch(shape, dtype, device, padding=5)
    queries = queries_a_tile(shape.heads // shape.kv_heads)
    work = arrange(batch.runs, shape.window, spare_items(4, shape.kv_heads), queries, may_be_dense=False, mixed=True)
    if shape.window is None:
        assert len(work.merges), "nothing was cut into parts"
    items, merges, tiles = (torch.from_numpy(x).to(device, torch.int32) for x in (work.items, work.merges, work.tiles))
    out = torch.full((batch.runs.rows, shape.heads, shape.value_dim), float("nan"), device=device, dtype=dtype)
    caches = batch.k_cache, batch.v_cache, batch.tables
    decode(batch.q_THD, *caches, items, merges, out, shape.kv_heads, PAGE, 0.1, shape.softcap, batch.sinks_H)
    prefill(batch.q_THD, *caches, tiles, out, shape.kv_heads, PAGE, 0.1, shape.window, shape.softcap, batch.sinks_H)
    assert error(out, reference(batch, shape)) < (2e-6 if dtype == torch.float32 else 1e-2)


def test_items_only_step_fills_padding_with_zeros(device: torch.device) -> None:
    from dataplane.kernels.decode import decode

    shape = SHAPES[0]
    batch = make_batch(shape, torch.float32, device, padding=0)
    none = np.zeros(0, dtype=np.int64)
    work = arrange(Runs(none, none, none, none, 3), None, 4, 32, may_be_dense=False)
    items = torch.from_numpy(work.items).to(device, torch.int32)
    out = torch.full((3, shape.heads, shape.dim), float("nan"), device=device)
    decode(
        batch.q_THD, batch.k_cache, batch.v_cache, batch.tables, items, items[:0, :4], out, shape.kv_heads, PAGE, 0.1
    )
    assert (out == 0).all()
