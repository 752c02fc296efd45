"""The cache's memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dataplane.engine.kv_cache import KVCache, block_bytes
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
