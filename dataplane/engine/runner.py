"""Runs plans: this rank's part of the model over its part of the KV cache. Every rank of a replica has one.

Shape letters: N rows of logits, V vocabulary of this rank.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from dataplane.engine.attention import ATTENTION, running
from dataplane.engine.attention_cpu import CpuAttentionStep
from dataplane.engine.inputs import prepare
from dataplane.engine.kv_cache import KVCache
from dataplane.engine.linear import pack
from dataplane.engine.plan import StepPlan, probe_plan
from dataplane.models.fit import FittedModel, assert_attention_reached
from dataplane.progress import ProgressPage

ROWS_MIN_PACKED = 2
"""A packed product of one row has other bits than that of more (linear.py)."""

ROWS_MIN_ROUTED = 4
"""Routers compute with plain products of their own, and those have other bits below four rows."""


class ModelRunner:
    """A loaded model and, after `allocate`, its cache."""

    def __init__(self, model: FittedModel, device: torch.device, block_tokens: int, page: ProgressPage | None) -> None:
        self._rows_min = 1
        if device.type == "cpu":
            pack(model.module)
            routes = any(hasattr(item, "perdure_experts") for item in model.module.modules())
            self._rows_min = ROWS_MIN_ROUTED if routes else ROWS_MIN_PACKED
        self._model = model
        self._device = device
        self._block_tokens = block_tokens
        self._page = page
        self._cache = self._new_cache(0)

    def allocate(self, total_blocks: int) -> None:
        """An empty cache of so many blocks; the old one is dropped first."""
        self._cache = self._new_cache(0)
        self._cache = self._new_cache(total_blocks)

    def scrub(self, blocks: list[int]) -> None:
        """Zero these blocks of the cache."""
        self._cache.scrub(blocks)

    def run(self, plan: StepPlan) -> Tensor:
        """Logits (N, V) of the rows that the plan wants, on the device."""
        inputs = prepare(
            plan,
            self._block_tokens,
            self._device,
            needs_rope_lengths=self._model.needs_rope_lengths,
            rows_min=self._rows_min,
        )
        step = CpuAttentionStep(self._cache, inputs, self._page)
        with torch.inference_mode(), running(step):
            return self._model.forward(inputs.tokens_T, None, inputs.positions_T, inputs.rows_N, inputs.rope_lengths_T)

    def measure(self, tokens: int) -> float:
        """Seconds that a prompt of so many tokens takes, in a cache of its own that is dropped again.

        Asserts that every attention layer comes to our function, and warms up what has to be.
        """
        self.allocate(-(-tokens // self._block_tokens))
        plan = probe_plan(tokens, self._block_tokens)
        assert_attention_reached(self._model, lambda: self.run(plan), ATTENTION)
        begun = time.perf_counter()
        self.run(plan)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elapsed = time.perf_counter() - begun
        self.allocate(0)
        return elapsed

    def _new_cache(self, total_blocks: int) -> KVCache:
        return KVCache(self._model.attention, total_blocks, self._block_tokens, self._model.dtype, self._device)
