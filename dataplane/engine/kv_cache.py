"""Keys and values of all cached positions, in blocks.

They are kept in the model's type, or as 8-bit floats (E4M3): a position's values of one head over a power of two that
brings the largest near the top of their range, with its exponent beside them. That is half the memory, for a relative
error of about 3 % a value, and depends on nothing but the position's own values.

Shape letters: S slots (positions of all blocks), T tokens, B blocks, L positions of a block, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from controlplane.runtime.errors import invalid
from dataplane.models.dry_run import AttentionLayer

FP8 = torch.float8_e4m3fn

_EXPONENTS_FROM = -100
"""A head of zeros, or near it, has this exponent."""

_TOP_BITS = 8
"""Scaled values are below 2 to this: E4M3 ends at 448."""


def cache_dtype(name: str, model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to keep keys and values in: the model's for "auto". Raises Rejected where the device cannot."""
    if name == "auto":
        return model_dtype
    if name != "fp8_e4m3":
        raise invalid(f"kv_cache_dtype {name!r} is neither auto nor fp8_e4m3")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise invalid(f"kv_cache_dtype fp8_e4m3: {torch.cuda.get_device_name(device)} has no 8-bit floats")
    return FP8


class KVCache:
    """One key and one value tensor a layer of this stage, each (B, L · K · D), zeroed; of 8-bit floats also their
    exponents, int8 (B, L · K).

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
        """`dtype`: of the tensors, as `cache_dtype` gives it."""
        self.layers = tuple(layers)
        self.block_tokens = block_tokens
        self.total_blocks = total_blocks
        self.keys = [
            _zeros(total_blocks, block_tokens * layer.kv_heads * layer.key_dim, dtype, device) for layer in layers
        ]
        self.values = [
            _zeros(total_blocks, block_tokens * layer.kv_heads * layer.value_dim, dtype, device) for layer in layers
        ]
        self._exponents = [
            tuple(_zeros(total_blocks, block_tokens * layer.kv_heads, torch.int8, device) for _ in range(2))
            for layer in layers
            if dtype == FP8
        ]

    def exponents(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Of layer `index`'s keys and values; None where they are kept as they are."""
        if not self._exponents:
            return None
        keys, values = self._exponents[index]
        return keys, values

    def write(self, index: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Store the keys and values of the step's tokens in layer `index`."""
        exponents = self.exponents(index)
        for which, (cache, rows) in enumerate(((self.keys[index], k_TKD), (self.values[index], v_TKD))):
            if exponents is not None:
                rows, exponents_TK = quantise(rows)
                exponents[which].view(-1, rows.shape[1]).index_copy_(0, slots_T, exponents_TK)
                cache = cache.view(torch.uint8)
            flat = rows.reshape(rows.shape[0], -1)
            cache.view(-1, flat.shape[1]).index_copy_(0, slots_T, flat)

    def gather(self, index: int, blocks_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of these blocks, (B · L, K, D) each in `dtype`, copied."""
        layer = self.layers[index]
        exponents = self.exponents(index)
        parts: list[Tensor] = []
        for which, (cache, dim) in enumerate(
            ((self.keys[index], layer.key_dim), (self.values[index], layer.value_dim))
        ):
            # Whole rows of a flat table: about eight times as fast as indexing positions one by one on a CPU.
            if exponents is None:
                parts.append(cache.index_select(0, blocks_B).view(-1, layer.kv_heads, dim))
                continue
            bits = cache.view(torch.uint8).index_select(0, blocks_B).view(-1, layer.kv_heads, dim)
            powers = exponents[which].index_select(0, blocks_B).view(-1, layer.kv_heads, 1)
            parts.append(torch.ldexp(bits.view(FP8).float(), powers).to(dtype))
        return parts[0], parts[1]

    def scrub(self, blocks: Sequence[int]) -> None:
        """Zero these blocks: a value that is no number would reach whoever reads the block next, masked or not."""
        for cache in (*self.keys, *self.values):
            cache.view(torch.uint8)[list(blocks)] = 0


def quantise(x_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of 8-bit floats (T, K, D), uint8, and exponents (T, K), int8: as dataplane/kernels/rotary.py stores them."""
    x = x_TKD.float()
    top = x.abs().amax(-1)
    exponents = (torch.frexp(top).exponent - _TOP_BITS).clamp_(min=_EXPONENTS_FROM)
    exponents = exponents.masked_fill_(top == 0, _EXPONENTS_FROM)
    return torch.ldexp(x, -exponents.unsqueeze(-1)).to(FP8).view(torch.uint8), exponents.to(torch.int8)


def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or not rows:
        return torch.zeros(rows, columns * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype)
    # torch writes its zeros, which takes all the memory at once; numpy asks the system for memory that reads as zero.
    empty = np.zeros(rows * columns * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(empty).view(dtype).view(rows, columns)


def block_bytes(layers: Sequence[AttentionLayer], block_tokens: int, dtype: torch.dtype) -> int:
    """Memory of one block over these layers, kept in `dtype`."""
    beside = 2 if dtype == FP8 else 0
    return block_tokens * sum(
        layer.kv_heads * ((layer.key_dim + layer.value_dim) * dtype.itemsize + beside) for layer in layers
    )
