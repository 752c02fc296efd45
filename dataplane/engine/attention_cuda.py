"""Attention on a GPU: our kernels over the paged cache, and dense attention for long prompts without a cached prefix.

The cache's rows hold a block as (K, L, D).

Shape letters: T tokens of the step, H query heads, K KV heads, D head size, L positions of a block, R rotated
dimensions, S tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataplane.engine.arrangement import DenseRun
from dataplane.engine.attention import Score
from dataplane.engine.kv_cache import KVCache
from dataplane.kernels.decode import decode
from dataplane.kernels.prefill import prefill
from dataplane.kernels.rotary import NONE, HeadNorm, place
from dataplane.progress import ProgressPage

_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


@dataclass(frozen=True, slots=True)
class Kind:
    """What layers of one arrangement have in common."""

    window: int | None
    heads: int
    kv_heads: int
    # Whether long prompts may be attended densely: the library knows no caps, no sinks, no uneven head sizes.
    may_be_dense: bool


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWork:
    """An Arrangement on the device."""

    items: Tensor
    merges: Tensor
    tiles: Tensor
    dense: tuple[DenseRun, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """How queries and keys are prepared, where the step does it and not the model."""

    cos_TR: Tensor
    sin_TR: Tensor
    # As in dataplane/kernels/rotary.py.
    layout: int
    norms: tuple[HeadNorm, HeadNorm] | None = None


class CudaAttentionStep:
    """One step's attention. `work` gives the arrangement for a kind of layer."""

    def __init__(
        self,
        cache: KVCache,
        slots_T: Tensor,
        tables: Tensor,
        work: Callable[[Kind], DeviceWork],
        page: ProgressPage | None = None,
        rows_N: Tensor | None = None,
    ) -> None:
        # Rows whose logits are wanted; None: all.
        self.rows_N = rows_N
        self._cache = cache
        self._slots_T = slots_T
        self._tables = tables
        self._work = work
        self._page = page

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, score: Score) -> Tensor:
        """See AttentionStep."""
        q_THD, k_TKD, v_TKD = (_dense_heads(x) for x in (q_THD, k_TKD, v_TKD))
        return self.attend_prepared(layer, q_THD, k_TKD, v_TKD, score, None)

    def attend_prepared(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, score: Score, turn: Turn | None
    ) -> Tensor:
        """As `attend`, for heads that are dense in memory; with `turn`, normed and rotated on the way."""
        heads, kv_heads = q_THD.shape[1], k_TKD.shape[1]
        plain = score.softcap is None and score.sinks_H is None and q_THD.shape[2] == v_TKD.shape[2]
        work = self._work(Kind(score.window, heads, kv_heads, plain and q_THD.dtype != torch.float32))
        k_cache, v_cache = self._cache.keys[layer], self._cache.values[layer]
        page = self._cache.block_tokens
        q_THD, k_TKD = place(
            q_THD,
            k_TKD,
            v_TKD,
            self._slots_T,
            k_cache,
            v_cache,
            page,
            turn=None if turn is None else (turn.cos_TR, turn.sin_TR),
            layout=NONE if turn is None else turn.layout,
            norms=None if turn is None else turn.norms,
            keep_k=turn is not None and bool(work.dense),
        )
        if len(work.dense) == 1 and work.dense[0].rows == slice(0, len(q_THD)):
            self._advance()
            return _dense(work.dense[0], q_THD, k_TKD, v_TKD, score.scaling)
        out_THD = torch.empty(q_THD.shape[0], heads, v_TKD.shape[2], dtype=q_THD.dtype, device=q_THD.device)
        sinks_H = score.sinks_H
        decode(
            q_THD, k_cache, v_cache, self._tables, work.items, work.merges, out_THD, kv_heads, page, score.scaling,
            score.softcap, sinks_H,
        )  # fmt: skip
        prefill(
            q_THD, k_cache, v_cache, self._tables, work.tiles, out_THD, kv_heads, page, score.scaling, score.window,
            score.softcap, sinks_H,
        )  # fmt: skip
        for run in work.dense:
            out_THD[run.rows] = _dense(run, q_THD, k_TKD, v_TKD, score.scaling)
        self._advance()
        return out_THD

    def _advance(self) -> None:
        if self._page is not None:
            self._page.advance()


def _dense(run: DenseRun, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> Tensor:
    """(rows of the run, H, D)."""
    q, k, v = (x[run.rows].unflatten(0, (run.count, run.length)).transpose(1, 2) for x in (q_THD, k_TKD, v_TKD))
    with sdpa_kernel(_BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _dense_heads(x_THD: Tensor) -> Tensor:
    """The same with each row's heads one behind the other, as our kernels read them."""
    dense = x_THD.stride(2) == 1 and x_THD.stride(1) == x_THD.shape[2]
    return x_THD if dense else x_THD.contiguous()
