"""A plain attention function to verify fitting with: causal, over the sequences of one flat batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

REFERENCE = "reference"

LENGTHS: list[int] = []
"""Lengths of the sequences that lie one behind the other in the batch under way."""


def attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float = 1.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """q (1, H, T, D), k and v (1, K, T, D) → (1, T, H, D), each sequence on its own."""
    assert mask is None
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    parts = [
        _one(qs, ks, vs, scaling, sliding_window, softcap, s_aux)
        for qs, ks, vs in zip(q.split(LENGTHS, 2), k.split(LENGTHS, 2), v.split(LENGTHS, 2), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def _one(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None, :]
    seen = (distance >= 0) & (distance < (window or q.shape[2] + 1))
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is None:
        return scores.softmax(-1) @ v
    column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v


def register() -> None:
    """Make the function known to transformers."""
    ALL_ATTENTION_FUNCTIONS.register(REFERENCE, attend)
