"""Attention on a GPU: our kernels over the paged cache, and dense attention for long prompts without a cached prefix.

The cache's rows hold a block as (K, L, D).

Shape letters: T tokens of the step, H query heads, K KV heads, D head size, L positions of a block, R rotated
dimensions, S tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dataplane.engine.arrangement import DenseRun
from dataplane.engine.attention import Score
from dataplane.engine.attention_choice import Dense
from dataplane.engine.kv_cache import KVCache
from dataplane.kernels.decode import decode
from dataplane.kernels.prefill import prefill, prefill_split
from dataplane.kernels.rotary import NONE, HeadNorm, place
from dataplane.progress import ProgressPage


@dataclass(frozen=True, slots=True)
class Kind:
    """What layers of one arrangement have in common."""

    window: int | None
    heads: int
    kv_heads: int
    # Whether long prompts may be attended densely: the library knows no caps, no sinks, no uneven head sizes.
    may_be_dense: bool
    has_sinks: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class SplitWork:
    """A Split on the device, for one launch."""

    tiles: Tensor
    merges: Tensor
    parts: int


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWork:
    """An Arrangement on the device."""

    items: Tensor
    merges: Tensor
    tiles: Tensor
    dense: tuple[DenseRun, ...] = ()


Work = DeviceWork | tuple[SplitWork, ...]
"""Of a step, or of a batch-invariant one."""


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
        work: Callable[[Kind], Work],
        page: ProgressPage | None = None,
        rows_N: Tensor | None = None,
        dense: Dense | None = None,
    ) -> None:
        # What attends long prompts, where the work has any.
        self._dense = dense
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
        may_be_dense = plain and q_THD.dtype != torch.float32
        work = self._work(Kind(score.window, heads, kv_heads, may_be_dense, score.sinks_H is not None))
        dense = work.dense if isinstance(work, DeviceWork) else ()
        q_THD, k_TKD = place(
            q_THD,
            k_TKD,
            v_TKD,
            self._slots_T,
            self._cache.keys[layer],
            self._cache.values[layer],
            self._cache.block_tokens,
            turn=None if turn is None else (turn.cos_TR, turn.sin_TR),
            layout=NONE if turn is None else turn.layout,
            norms=None if turn is None else turn.norms,
            keep_k=turn is not None and bool(dense),
            exponents=self._cache.exponents(layer),
        )
        self._advance()
        if len(dense) == 1 and dense[0].rows == slice(0, len(q_THD)):
            return self._attend_run(dense[0], q_THD, k_TKD, v_TKD, score.scaling)
        out_THD = torch.empty(q_THD.shape[0], heads, v_TKD.shape[2], dtype=q_THD.dtype, device=q_THD.device)
        if isinstance(work, DeviceWork):
            self._over_cache(layer, q_THD, out_THD, kv_heads, score, work)
        else:
            self._over_splits(layer, q_THD, out_THD, kv_heads, score, work)
        for run in dense:
            out_THD[run.rows] = self._attend_run(run, q_THD, k_TKD, v_TKD, score.scaling)
        return out_THD

    def _over_cache(
        self, layer: int, q_THD: Tensor, out_THD: Tensor, kv_heads: int, score: Score, work: DeviceWork
    ) -> None:
        caches = self._cache.keys[layer], self._cache.values[layer], self._tables
        page, exponents = self._cache.block_tokens, self._cache.exponents(layer)
        decode(
            q_THD, *caches, work.items, work.merges, out_THD, kv_heads, page, score.scaling, score.softcap,
            score.sinks_H, exponents,
        )  # fmt: skip
        prefill(
            q_THD, *caches, work.tiles, out_THD, kv_heads, page, score.scaling, score.window, score.softcap,
            score.sinks_H, exponents,
        )  # fmt: skip

    def _over_splits(
        self, layer: int, q_THD: Tensor, out_THD: Tensor, kv_heads: int, score: Score, work: tuple[SplitWork, ...]
    ) -> None:
        caches = self._cache.keys[layer], self._cache.values[layer], self._tables
        for part in work:
            prefill_split(
                q_THD, *caches, part.tiles, part.merges, part.parts, out_THD, kv_heads, self._cache.block_tokens,
                score.scaling, score.window, score.softcap, score.sinks_H, self._cache.exponents(layer),
            )  # fmt: skip

    def _attend_run(self, run: DenseRun, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> Tensor:
        """(rows of the run, H, D)."""
        assert self._dense is not None, "nothing was chosen for dense runs"
        q, k, v = (x[run.rows].unflatten(0, (run.count, run.length)) for x in (q_THD, k_TKD, v_TKD))
        return self._dense(q, k, v, scale).flatten(0, 1)

    def _advance(self) -> None:
        if self._page is not None:
            self._page.advance()


def _dense_heads(x_THD: Tensor) -> Tensor:
    """The same with each row's heads one behind the other, as our kernels read them."""
    dense = x_THD.stride(2) == 1 and x_THD.stride(1) == x_THD.shape[2]
    return x_THD if dense else x_THD.contiguous()
