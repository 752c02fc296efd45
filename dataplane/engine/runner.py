"""Runs plans: this rank's part of the model over its part of the KV cache. Every rank of a replica has one.

All ranks launch the same plans in the same order. The logits end at the driver: gathered over the tensor axis of the
last stage, and sent from there to the first.

Shape letters: T tokens of the step, H hidden size, N rows of logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from controlplane.runtime.packing import unpack_u32
from dataplane.engine.attention import ATTENTION, running
from dataplane.engine.attention_cpu import CpuAttentionStep
from dataplane.engine.inputs import StepInputs, prepare
from dataplane.engine.kv_cache import KVCache
from dataplane.engine.linear import pack
from dataplane.engine.plan import StepPlan, probe_plan
from dataplane.models.fit import FittedModel, assert_attention_reached
from dataplane.parallel.groups import Sent
from dataplane.parallel.mesh import Mesh
from dataplane.parallel.pipeline import StageLink
from dataplane.progress import ProgressPage

ROWS_MIN_PACKED = 2
"""A packed product of one row has other bits than that of more (linear.py)."""

ROWS_MIN_ROUTED = 4
"""Routers compute with plain products of their own, and those have other bits below four rows."""


class ModelRunner:
    """A loaded model and, after `allocate`, its cache."""

    def __init__(
        self,
        model: FittedModel,
        device: torch.device,
        block_tokens: int,
        page: ProgressPage | None,
        report: Callable[[float], None],
    ) -> None:
        """Puts the weights into the form that is fastest here; `report` gets the share that is done."""
        # Rows that a step has at least; equal on all ranks, for hidden states travel between them.
        self.rows_min = 1
        if device.type == "cpu":
            pack(model.module, report)
            routes = any(hasattr(item, "perdure_experts") for item in model.module.modules())
            self.rows_min = ROWS_MIN_ROUTED if routes else ROWS_MIN_PACKED
        self._device = device
        self._block_tokens = block_tokens
        self._page = page
        self.attach(model)
        self._cache = self._new_cache(0)

    def attach(self, model: FittedModel) -> None:
        """Go on with the same weights on another epoch's mesh."""
        self._model = model
        self._mesh = model.mesh
        self._stages = StageLink(self._mesh.pipeline, model.config.hidden_size, model.dtype, self._device)
        # Logits of steps launched: here (one stage), or travelling to the driver.
        self._logits: deque[Tensor] = deque()
        self._sent: deque[Sent] = deque()
        # Tokens that the last step gave, by entry.
        self._drawn_E = torch.zeros(0, dtype=torch.long, device=self._device)

    @property
    def mesh(self) -> Mesh:
        return self._mesh

    def allocate(self, total_blocks: int) -> None:
        """An empty cache of so many blocks; the old one is dropped first."""
        self._cache = self._new_cache(0)
        self._cache = self._new_cache(total_blocks)

    def launch(self, plan: StepPlan) -> None:
        """Run this rank's part of a step. Returns once the next rank can go on, with work still on the device."""
        with torch.inference_mode():
            if plan.scrub:
                self._cache.scrub(unpack_u32(plan.scrub).tolist())
            inputs = prepare(
                plan,
                self._block_tokens,
                self._device,
                needs_rope_lengths=self._model.needs_rope_lengths,
                rows_min=self.rows_min,
            )
            out = self._forward(inputs, self._tokens(inputs))
            self._drawn_E = torch.zeros(len(inputs.ragged.counts_E), dtype=torch.long, device=self._device)
            if self._mesh.is_last_stage:
                self._keep_logits(out)
            else:
                self._stages.send_hidden(out)

    def feed(self, drawn_E: Tensor) -> None:
        """Driver only: what the step launched last gave, by entry, for the next one to take from the device."""
        self._drawn_E = drawn_E

    def finish(self, rows: int) -> Tensor:
        """Driver only: the (rows, V) logits of the oldest step launched and not finished, on the device."""
        if self._mesh.is_last_stage:
            return self._logits.popleft()
        logits = torch.empty(rows, self._model.vocab_size, dtype=self._model.dtype, device=self._device)
        if not rows:
            return logits
        return self._mesh.pipeline.receive(logits, self._mesh.pipeline.size - 1)

    def measure(self, tokens: int) -> float:
        """Seconds that a prompt of so many tokens takes, in a cache of its own that is dropped again.

        All ranks together. Asserts that every attention layer comes to our function, and warms up what has to be.
        """
        self.allocate(-(-tokens // self._block_tokens))
        plan = probe_plan(tokens, self._block_tokens)
        assert_attention_reached(self._model, lambda: self._probe(plan), ATTENTION)
        begun = time.perf_counter()
        self._probe(plan)
        elapsed = time.perf_counter() - begun
        self.allocate(0)
        return elapsed

    def _probe(self, plan: StepPlan) -> None:
        self.launch(plan)
        if self._mesh.is_driver:
            self.finish(1)
        self._logits.clear()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _tokens(self, inputs: StepInputs) -> Tensor:
        if inputs.fed_T is None:
            return inputs.tokens_T
        drawn_E = self._mesh.tensor.broadcast(self._drawn_E, 0)
        # A poisoned entry drew -1; what is computed from it is thrown away.
        return torch.where(inputs.fed_T < 0, inputs.tokens_T, drawn_E[inputs.fed_T.clamp(min=0)].clamp(min=0))

    def _forward(self, inputs: StepInputs, tokens_T: Tensor) -> Tensor:
        """Hidden states (T, H), or of the last stage this rank's columns of logits."""
        first = self._mesh.is_first_stage
        hidden_TH = None if first else self._stages.receive_hidden(len(tokens_T))
        with running(CpuAttentionStep(self._cache, inputs, self._page)):
            return self._model.forward(
                tokens_T if first else None,
                hidden_TH,
                inputs.positions_T,
                inputs.rows_N,
                inputs.rope_lengths_T,
            )

    def _keep_logits(self, part: Tensor) -> None:
        """Gather the vocabulary's parts, and send the whole to the driver if that is another stage's."""
        logits = part
        if part.shape[0]:
            logits = self._mesh.tensor.all_gather(part.contiguous()).transpose(0, 1).flatten(1)
        logits = logits[:, : self._model.vocab_size]
        if self._mesh.is_first_stage:
            self._logits.append(logits)
        elif part.shape[0] and self._mesh.tensor.index == 0:
            while len(self._sent) >= self._mesh.pipeline.size:
                self._sent.popleft().wait()
            self._sent.append(self._mesh.pipeline.send(logits.to(self._model.dtype), 0))

    def _new_cache(self, total_blocks: int) -> KVCache:
        return KVCache(self._model.attention, total_blocks, self._block_tokens, self._model.dtype, self._device)
