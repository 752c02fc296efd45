"""Random draws that depend on (seed, position, token id) alone: the same in any batch, on any rank, after any replay.

A counter-based generator (Salmon et al., SC 2011): a hash of its counters instead of a state. One Gumbel number a
token; the token with the largest logit + Gumbel number is a draw from the softmax (Gumbel-max). Keyed by the token's
global id, so a shard of the vocabulary draws what the whole would. Integers are the same everywhere; `log` differs in
the last bit between kinds of devices, so equal draws are promised for one kind.

Shape letters: M rows, C candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# lowbias32, a 32-bit mixer found by search (C. Wellons, "Prospecting for hash functions", 2018).
_SHIFTS = (16, 15, 16)
_FACTORS = (0x7FEB352D, 0x846CA68B)
_STEP = 0x9E3779B9


def draw_key(seed: int, position: int) -> int:
    """32 bits that stand for all draws at this position: an absolute token index, of a sequence with a u64 seed."""
    high = mix((seed >> 32) & _MASK)
    return mix(mix((seed & _MASK) ^ high ^ _STEP) ^ (position * _STEP & _MASK))


def mix(word: int) -> int:
    """lowbias32 of an unsigned 32-bit word."""
    word ^= word >> _SHIFTS[0]
    word = word * _FACTORS[0] & _MASK
    word ^= word >> _SHIFTS[1]
    word = word * _FACTORS[1] & _MASK
    return word ^ word >> _SHIFTS[2]


def keys(words: list[int], device: torch.device) -> Tensor:
    """(M,) int32 of `draw_key`s."""
    return place(np.array(words, dtype=np.uint32).view(np.int32), device)


def place(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Values on the device, without waiting for it: pageable memory would."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def token_words(ids: Tensor) -> Tensor:
    """int32 words of token ids, distinct and spread; the same for every draw, so worth keeping."""
    return ids.to(torch.int32) * _signed(_STEP | 1)


def uniform(keys_M: Tensor, words: Tensor) -> Tensor:
    """Float32 numbers in (0, 1) for keys (M,) and token words (C,) or (M, C) → (M, C)."""
    hashed = mix_(keys_M.unsqueeze(-1) ^ words)
    # 31 bits, finest near 0: there lie the rare draws that decide among many tokens.
    return hashed.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def gumbel(keys_M: Tensor, words: Tensor) -> Tensor:
    """Gumbel numbers -log(-log(1 - u)) of `uniform`.

    In float64 and back: a float32 logarithm's last bit may depend on the place in the array.
    """
    return uniform(keys_M, words).double().neg_().log1p_().neg_().log_().neg_().float()


def mix_(words: Tensor) -> Tensor:
    """`mix` of int32 words, in place."""
    for shift, factor in zip(_SHIFTS, (*_FACTORS, None), strict=True):
        # The shift of a signed word copies its sign: cut the copies off.
        words ^= (words >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        if factor is not None:
            words *= _signed(factor)
    return words


def _signed(word: int) -> int:
    return word - (1 << 32) if word & 0x80000000 else word
