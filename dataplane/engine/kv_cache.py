"""Keys and values of all cached positions, in blocks.

Shape letters: S slots (positions of all blocks), T tokens, B blocks, L positions of a block, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dataplane.models.dry_run import AttentionLayer


class KVCache:
    """One key and one value tensor a layer of this stage, each (B, L · K · D), zeroed.

    Zeroed memory of a CPU is only taken from the machine as it is written.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        total_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = tuple(layers)
        self.block_tokens = block_tokens
        self.keys = [
            _zeros(total_blocks, block_tokens * layer.kv_heads * layer.key_dim, dtype, device) for layer in layers
        ]
        self.values = [
            _zeros(total_blocks, block_tokens * layer.kv_heads * layer.value_dim, dtype, device) for layer in layers
        ]

    def write(self, index: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Store the keys and values of the step's tokens in layer `index`."""
        for cache, rows in ((self.keys[index], k_TKD), (self.values[index], v_TKD)):
            flat = rows.reshape(rows.shape[0], -1)
            cache.view(-1, flat.shape[1]).index_copy_(0, slots_T, flat)

    def gather(self, index: int, blocks_B: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these blocks, (B · L, K, D) each, copied."""
        layer = self.layers[index]
        # Whole rows of a flat table: about eight times as fast as indexing positions one by one on a CPU.
        k = self.keys[index].index_select(0, blocks_B)
        v = self.values[index].index_select(0, blocks_B)
        return k.view(-1, layer.kv_heads, layer.key_dim), v.view(-1, layer.kv_heads, layer.value_dim)

    def scrub(self, blocks: Sequence[int]) -> None:
        """Zero these blocks: a value that is no number would reach whoever reads the block next, masked or not."""
        for cache in (*self.keys, *self.values):
            cache[list(blocks)] = 0


def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or not rows:
        return torch.zeros(rows, columns, dtype=dtype, device=device)
    # torch writes its zeros, which takes all the memory at once; numpy asks the system for memory that reads as zero.
    empty = np.zeros(rows * columns * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(empty).view(dtype).view(rows, columns)


def block_bytes(layers: Sequence[AttentionLayer], block_tokens: int, dtype: torch.dtype) -> int:
    """Memory of one block over these layers."""
    width = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
    return block_tokens * width * dtype.itemsize
