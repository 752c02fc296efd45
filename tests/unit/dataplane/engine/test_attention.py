"""Paged attention against a float64 reference, and its bits against its own in other batches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from controlplane.runtime.packing import pack_u32
from dataplane.engine.attention import attend, running
from dataplane.engine.attention_cpu import CpuAttentionStep
from dataplane.engine.inputs import prepare
from dataplane.engine.kv_cache import KVCache
from dataplane.engine.plan import NO_FEEDBACK, StepPlan
from dataplane.models.dry_run import AttentionLayer

CPU = torch.device("cpu")
BLOCKS = 400


@dataclass(frozen=True, slots=True)
class Shape:
    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    block_tokens: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


SHAPES = {
    "multi-query": Shape(1, 4, 32, 32),
    "grouped": Shape(2, 3, 16, 16),
    "one head a KV head": Shape(4, 1, 24, 24),
    "small blocks": Shape(2, 2, 16, 16, block_tokens=4),
    "odd blocks": Shape(2, 2, 16, 16, block_tokens=24),
    "large blocks": Shape(2, 2, 16, 16, block_tokens=128),
    "window": Shape(2, 2, 16, 16, window=50),
    "narrow window": Shape(2, 2, 16, 16, window=3),
    "soft-cap": Shape(2, 2, 16, 16, softcap=2.0),
    "sinks": Shape(2, 3, 16, 16, sinks=True),
    "sinks in a window": Shape(2, 3, 16, 16, window=70, sinks=True),
    "values narrower than keys": Shape(2, 2, 24, 16),
    "wide heads": Shape(1, 4, 256, 256),
    "wide heads, soft-cap": Shape(1, 3, 256, 256, softcap=2.0),
    "wide keys": Shape(2, 1, 192, 128),
    "very wide heads": Shape(1, 1, 512, 512),
    "features that fill no register": Shape(2, 2, 80, 80),
}


class Device:
    """A cache with sequences of random queries, keys and values, attended to in any chunks."""

    def __init__(self, shape: Shape, dtype: torch.dtype, lengths: list[int]) -> None:
        torch.manual_seed(5)
        self.shape, self.dtype = shape, dtype
        layer = AttentionLayer(0, 0, shape.kv_heads, shape.heads, shape.key_dim, shape.value_dim, shape.window)
        self.cache = KVCache([layer], BLOCKS, shape.block_tokens, dtype, CPU)
        # What an earlier user left must not matter.
        self.cache.keys[0].normal_()
        self.cache.values[0].normal_()
        self.q = [torch.randn(n, shape.heads, shape.key_dim).to(dtype) for n in lengths]
        self.k = [torch.randn(n, shape.kv_heads, shape.key_dim).to(dtype) for n in lengths]
        self.v = [torch.randn(n, shape.kv_heads, shape.value_dim).to(dtype) for n in lengths]
        self.sinks = torch.randn(shape.heads).to(dtype) if shape.sinks else None
        free = list(range(BLOCKS))
        random.Random(3).shuffle(free)
        self.tables = [[free.pop() for _ in range(-(-n // shape.block_tokens))] for n in lengths]

    def step(self, *chunks: tuple[int, int, int]) -> list[Tensor]:
        """Attend for (sequence, start, count) chunks in one step."""
        inputs = prepare(self._plan(chunks), self.shape.block_tokens, CPU, needs_rope_lengths=False, rows_min=4)
        step = CpuAttentionStep(self.cache, inputs)
        q, k, v = (torch.cat([side[s][a : a + n] for s, a, n in chunks]) for side in (self.q, self.k, self.v))
        # A small step repeats its last row.
        rows = len(inputs.tokens_T)
        q, k, v = (torch.cat((side, side[-1:].expand(rows - len(side), -1, -1))) for side in (q, k, v))
        layer = SimpleNamespace(perdure_layer=0)
        with running(step):
            out, _ = attend(
                layer,
                *(side.transpose(0, 1)[None] for side in (q, k, v)),
                None,
                scaling=0.2,
                sliding_window=self.shape.window,
                softcap=self.shape.softcap,
                s_aux=self.sinks,
            )
        assert out.shape == (1, rows, self.shape.heads, self.shape.value_dim)
        tokens = sum(n for _, _, n in chunks)
        assert torch.equal(out[0, tokens:], out[0, tokens - 1].expand(rows - tokens, -1, -1))
        return list(out[0, :tokens].split([n for _, _, n in chunks]))

    def whole(self, sequence: int) -> Tensor:
        return self.step((sequence, 0, len(self.q[sequence])))[0]

    def expected(self, sequence: int) -> Tensor:
        """The definition, in float64."""
        shape = self.shape
        q, k, v = (side[sequence].double() for side in (self.q, self.k, self.v))
        k, v = (side.repeat_interleave(shape.group, 1) for side in (k, v))
        scores = torch.einsum("thd,lhd->htl", q, k) * 0.2
        if shape.softcap:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        scores[:, (distance < 0) | (distance >= (shape.window or len(q)))] = float("-inf")
        if self.sinks is not None:
            scores = torch.cat((scores, self.sinks.double()[:, None, None].expand(-1, len(q), 1)), -1)
        weights = scores.softmax(-1)[..., : len(q)]
        return torch.einsum("htl,lhd->thd", weights, v)

    def _plan(self, chunks: tuple[tuple[int, int, int], ...]) -> StepPlan:
        tables = [self.tables[s][: -(-(a + n) // self.shape.block_tokens)] for s, a, n in chunks]
        zeros = pack_u32([0] * len(chunks))
        return StepPlan(
            number=1,
            sequences=zeros,
            starts=pack_u32([a for _, a, _ in chunks]),
            counts=pack_u32([n for _, _, n in chunks]),
            tokens=pack_u32([0] * sum(n for _, _, n in chunks)),
            table_lengths=pack_u32([len(table) for table in tables]),
            tables=pack_u32([block for table in tables for block in table]),
            logit_counts=zeros,
            samples=zeros,
            rope_lengths=zeros,
            feedback=pack_u32([NO_FEEDBACK] * len(chunks)),
        )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_batch_is_the_definition_within_rounding(name: str, dtype: torch.dtype) -> None:
    lengths = [1, 2, 17, 128, 129, 300]
    device = Device(SHAPES[name], dtype, lengths)
    outputs = device.step(*((s, 0, n) for s, n in enumerate(lengths)))
    # Wider heads have larger scores.
    tolerance = 3e-6 * max(device.shape.key_dim / 64, 1) if dtype == torch.float32 else 2e-2
    for sequence, out in enumerate(outputs):
        assert (out.double() - device.expected(sequence)).abs().max() < tolerance


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_chunks_or_neighbours(name: str, dtype: torch.dtype) -> None:
    """A position's output is the same decoded, chunked anyhow, whole, alone and in a batch."""
    lengths = [270, 150, 128, 7]
    device = Device(SHAPES[name], dtype, lengths)
    whole = [device.whole(sequence) for sequence in range(len(lengths))]
    chooser = random.Random(11)
    done = [0] * len(lengths)
    while any(at < n for at, n in zip(done, lengths, strict=True)):
        chunks = []
        for sequence, length in enumerate(lengths):
            left = length - done[sequence]
            if left and chooser.random() < 0.8:
                chunks.append((sequence, done[sequence], min(left, chooser.choice([1, 1, 1, 2, 3, 5, 31, 64, 100]))))
        for (sequence, start, count), out in zip(chunks, device.step(*chunks) if chunks else [], strict=True):
            assert torch.equal(out, whole[sequence][start : start + count]), (sequence, start, count)
            done[sequence] = start + count


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_where_a_tile_is_cut_off(name: str, dtype: torch.dtype) -> None:
    """A short sequence is shown as much of its tile as it fills, beside a longer one more, beside a long one all."""
    lengths = [1, 20, 33, 70, 100, 140]
    device = Device(SHAPES[name], dtype, lengths)
    beside = [device.whole(sequence) for sequence in range(len(lengths))]
    for longest in range(len(lengths)):
        last = device.step(*((sequence, lengths[sequence] - 1, 1) for sequence in range(longest + 1)))
        chunks = device.step(*((s, lengths[s] // 2, lengths[s] - lengths[s] // 2) for s in range(longest + 1)))
        for sequence, (one, some) in enumerate(zip(last, chunks, strict=True)):
            assert torch.equal(one[-1], beside[sequence][-1]), (sequence, longest)
            assert torch.equal(some, beside[sequence][lengths[sequence] // 2 :]), (sequence, longest)


def test_prompt_is_attended_in_pieces_that_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(SHAPES["grouped"], torch.float32, [333])
    whole = device.whole(0)
    monkeypatch.setattr("dataplane.engine.tiles.PARTIAL_ELEMENTS_MAX", 20_000)
    assert torch.equal(device.whole(0), whole)


def test_attention_outside_a_step_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="outside a step"):
        attend(SimpleNamespace(perdure_layer=0), *(torch.zeros(1, 1, 1, 4),) * 3, None, scaling=1.0)
