"""The attention kernels against a float64 reference, over ragged batches."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dataplane.engine.arrangement import Runs, arrange, spare_items
from dataplane.engine.kv_cache import FP8, quantise
from dataplane.engine.splits import split

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
    # Of a cache of 8-bit floats, whose values `keys` and `values` then are.
    exponents: tuple[Tensor, Tensor] | None = None

    def rows(self, entry: int) -> slice:
        first = int(self.runs.offsets_E[entry])
        return slice(first, first + int(self.runs.counts_E[entry]))


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


def in_8_bits(batch: Batch, shape: Shape) -> Batch:
    """The same batch over a cache of 8-bit floats, and what a reader finds in it."""
    caches: list[Tensor] = []
    exponents: list[Tensor] = []
    for cache, dim in ((batch.k_cache, shape.dim), (batch.v_cache, shape.value_dim)):
        bits, powers = quantise(cache.cpu().float().nan_to_num(1e4).view(len(cache), -1, dim))
        caches.append(bits.view(FP8).flatten(1).to(batch.q_THD.device))
        exponents.append(powers.to(batch.q_THD.device))

    def read(x_SKD: Tensor) -> Tensor:
        bits, powers = quantise(x_SKD.float())
        return torch.ldexp(bits.view(FP8).float(), powers.unsqueeze(-1)).double()

    return replace(
        batch,
        keys=[read(x) for x in batch.keys],
        values=[read(x) for x in batch.values],
        k_cache=caches[0],
        v_cache=caches[1],
        exponents=(exponents[0], exponents[1]),
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


@pytest.mark.parametrize("cache", ["own", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch_against_float64(device: torch.device, shape: Shape, dtype: torch.dtype, cache: str) -> None:
    """Decodes cut into parts, chunks, and rows that only fill the step up; nothing unwritten is left or read."""
    from dataplane.kernels.decode import decode
    from dataplane.kernels.prefill import prefill, queries_a_tile

    skip_bfloat16(device, dtype)
    batch = make_batch(shape, dtype, device, padding=5)
    batch = batch if cache == "own" else in_8_bits(batch, shape)
    queries = queries_a_tile(shape.heads // shape.kv_heads)
    work = arrange(batch.runs, shape.window, spare_items(4, shape.kv_heads), queries, may_be_dense=False, mixed=True)
    if shape.window is None:
        assert len(work.merges), "nothing was cut into parts"
    items, merges, tiles = (torch.from_numpy(x).to(device, torch.int32) for x in (work.items, work.merges, work.tiles))
    out = torch.full((batch.runs.rows, shape.heads, shape.value_dim), float("nan"), device=device, dtype=dtype)
    caches = batch.k_cache, batch.v_cache, batch.tables
    more = batch.sinks_H, batch.exponents
    decode(batch.q_THD, *caches, items, merges, out, shape.kv_heads, PAGE, 0.1, shape.softcap, *more)
    prefill(batch.q_THD, *caches, tiles, out, shape.kv_heads, PAGE, 0.1, shape.window, shape.softcap, *more)
    assert error(out, reference(batch, shape)) < (2e-6 if dtype == torch.float32 else 1e-2)


def skip_bfloat16(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 product")


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits; the interpreter's products add up as numpy likes."""
    return torch.equal(a, b) if a.is_cuda else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def run_split(batch: Batch, shape: Shape, runs: Runs, q_THD: Tensor, parts_max: int) -> Tensor:
    from dataplane.kernels.prefill import ROWS_SPLIT, prefill_split, queries_a_tile

    queries = queries_a_tile(shape.heads // shape.kv_heads, ROWS_SPLIT)
    out = torch.full((runs.rows, shape.heads, shape.value_dim), float("nan"), device=q_THD.device, dtype=q_THD.dtype)
    for part in split(runs, shape.window, queries, parts_max, merge_all=shape.sinks):
        tiles, merges = (torch.from_numpy(x).to(q_THD.device, torch.int32) for x in (part.tiles, part.merges))
        prefill_split(
            q_THD, batch.k_cache, batch.v_cache, batch.tables, tiles, merges, part.parts, out, shape.kv_heads, PAGE,
            0.1, shape.window, shape.softcap, batch.sinks_H, batch.exponents,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_tiles_are_batch_invariant(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    """Right, and every query with the same bits as alone, one token a step, and in launches of few parts."""
    skip_bfloat16(device, dtype)
    batch = make_batch(shape, dtype, device, padding=5)
    whole = run_split(batch, shape, batch.runs, batch.q_THD, 1 << 20)
    assert error(whole, reference(batch, shape)) < (2e-6 if dtype == torch.float32 else 1e-2)
    assert same(run_split(batch, shape, batch.runs, batch.q_THD, 40), whole)
    zero = np.zeros(1, dtype=np.int64)
    for entry, (start, count) in enumerate(ENTRIES):
        q_THD = batch.q_THD[batch.rows(entry)]
        # The first and the last token by themselves, and the rest of the run between them.
        cuts = [0, 1, count - 1, count] if count > 2 else list(range(count + 1))
        for low, high in pairwise(cuts):
            runs = Runs(zero + start + low, zero + high - low, zero, zero + batch.runs.tables_E[entry], high - low)
            alone = run_split(batch, shape, runs, q_THD[low:high], 1 << 20)
            assert same(alone, whole[batch.rows(entry)][low:high]), (entry, low)


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
