"""The cache's memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dataplane.engine.kv_cache import FP8, KVCache, block_bytes
from dataplane.models.dry_run import AttentionLayer

LAYERS = [AttentionLayer(index, index, 2, 8, 64, 64, None) for index in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_cache_takes_no_memory_from_the_machine(dtype: torch.dtype) -> None:
    before = private_bytes()
    blocks = (1 << 29) // block_bytes(LAYERS, 16, dtype)
    cache = KVCache(LAYERS, blocks, 16, dtype, torch.device("cpu"))
    assert sum(part.nbytes for part in (*cache.keys, *cache.values)) > 1 << 28
    assert private_bytes() - before < 1 << 24
    assert not cache.keys[0][blocks - 1].any()


def private_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_8_bit_floats_take_half_the_memory_and_keep_values_of_any_size() -> None:
    cpu = torch.device("cpu")
    assert block_bytes(LAYERS, 16, torch.bfloat16) / block_bytes(LAYERS, 16, FP8) > 1.9
    cache = KVCache(LAYERS, 3, 16, FP8, cpu)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-6, 1.0, 500.0, 3e7, 0.0]).view(-1, 1, 1)
    keys, values = (torch.randn(5, 2, 64, generator=generator) * sizes for _ in range(2))
    slots = torch.tensor([40, 3, 17, 0, 5])
    cache.write(1, slots, keys, values)
    for got, wanted in zip(cache.gather(1, torch.arange(3), torch.float32), (keys, values), strict=True):
        off = (got[slots] - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)
        assert off.max() < 0.04
    cache.write(2, slots[1:2], keys[1:2], values[1:2])
    alone, among = (cache.gather(layer, torch.arange(3), torch.float32)[0][3] for layer in (2, 1))
    assert torch.equal(alone, among)
    cache.scrub([0])
    assert not cache.gather(1, torch.tensor([0]), torch.float32)[0].any()
