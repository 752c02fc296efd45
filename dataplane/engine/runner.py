"""Runs plans: this rank's part of the model over its part of the KV cache. Every rank of a replica has one.

All ranks launch the same plans in the same order. The logits end at the driver: gathered over the tensor axis of the
last stage, and sent from there to the first.

Shape letters: T tokens of the step, H hidden size, N rows of logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import structlog
import torch
from torch import Tensor

from controlplane.runtime.packing import unpack_u32
from dataplane.engine.attention import ATTENTION, running
from dataplane.engine.attention_cpu import CpuAttentionStep
from dataplane.engine.inputs import StepInputs, prepare, unpack
from dataplane.engine.kv_cache import KVCache
from dataplane.engine.linear import ROWS_MIN, pack
from dataplane.engine.plan import StepPlan, probe_plan, written_blocks
from dataplane.models.accelerate import Kit, accelerate, is_accelerated
from dataplane.models.cpu_layers import CpuKit
from dataplane.models.fit import FittedModel, assert_attention_reached
from dataplane.parallel.collectives import all_gather_data, broadcast_data
from dataplane.parallel.groups import UnderWay
from dataplane.parallel.mesh import Mesh
from dataplane.parallel.pipeline import StageLink
from dataplane.progress import ProgressPage

if TYPE_CHECKING:
    from dataplane.engine.attention_choice import Choice
    from dataplane.engine.cuda_steps import CudaSteps
    from dataplane.engine.cuda_work import WorkMaker

_log = structlog.get_logger()

PROBE_TOKENS_FIRST = 48
"""Length of the prompt that fast modules are compared on."""

STEPS_AHEAD_MAX = 2
"""Steps launched before the oldest one is done, beside one a stage."""

SUM_ROUNDS = 3
"""Steps that sums are timed in, each way by turns; the first ones set up what is new."""

FAST_ERROR_MAX = 0.1
"""Relative difference that other roundings may make in half precision; a wrong module makes one near 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """Logits of a step at the driver, on the device."""

    logits_NV: Tensor
    # Each row's arg-max, -1 where it is no number, if the step found it on the way.
    best_N: Tensor | None = None
    # The next step overwrites the logits.
    passing: bool = False


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step."""

    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Modes:
    """How to compute, as numerics.py and kv_cache.py settle it."""

    # Batch-invariant.
    exact: bool
    cache_dtype: torch.dtype


class ModelRunner:
    """A loaded model and, after `allocate`, its cache."""

    def __init__(
        self,
        model: FittedModel,
        device: torch.device,
        block_tokens: int,
        page: ProgressPage | None,
        report: Callable[[float], None],
        limits: StepLimits,
        modes: Modes,
    ) -> None:
        """Puts the weights into the form that is fastest here; `report` gets the share that is done."""
        self._modes = modes
        if device.type == "cpu":
            pack(model.module, report)
        self._device = device
        self._block_tokens = block_tokens
        self._page = page
        self._limits = limits
        self._steps: CudaSteps | None = None
        self._choice: Choice | None = None
        self._captures = False
        self._by_pieces = False
        # The latest steps: as many as may not be done when their epoch ends.
        self._recent: deque[StepPlan] = deque()
        self._attach(model)
        self._cache = self._new_cache(0)

    def attach(self, model: FittedModel, report: Callable[[float], None]) -> None:
        """Go on with the same weights and cache on another epoch's mesh. All its ranks together."""
        self._scrub_unfinished()
        self._attach(model)
        if self._captures:
            self.capture(report)

    def leave(self) -> None:
        """The mesh is over: what was captured of exchanges with its ranks goes."""
        if self._steps is not None and self._mesh.control.size > 1:
            self._steps.drop_graphs()

    def _attach(self, model: FittedModel) -> None:
        self._model = model
        self._mesh = model.mesh
        self._recent = deque(maxlen=self._mesh.pipeline.size + STEPS_AHEAD_MAX)
        self._stages = StageLink(self._mesh.pipeline, model.config.hidden_size, model.dtype, self._device)
        if self._steps is not None:
            self._steps.attach(model)
        # Logits of steps launched: at the driver that has them (one stage), or travelling to it.
        self._outputs: deque[Output] = deque()
        self._sent: deque[UnderWay] = deque()
        # Tokens that the last step gave, by row of logits, and the last row of each of its entries.
        self._drawn_N = torch.zeros(0, dtype=torch.long, device=self._device)
        self._ends_E = np.zeros(0, dtype=np.int64)

    @property
    def mesh(self) -> Mesh:
        return self._mesh

    @property
    def settled(self) -> list[int]:
        """What all ranks of a mesh must have alike: blocks of the cache, and whether sums are made by pieces."""
        return [self._cache.total_blocks, int(self._by_pieces)]

    def _scrub_unfinished(self) -> None:
        """Steps that an epoch's end cut off may have stored what is no number, out of an exchange that was aborted."""
        with torch.inference_mode():
            for plan in self._recent:
                self._cache.scrub(written_blocks(plan, self._block_tokens))

    def allocate(self, total_blocks: int) -> None:
        """An empty cache of so many blocks; the old one is dropped first."""
        self._steps = None
        self._recent.clear()
        self._cache = self._new_cache(0)
        self._cache = self._new_cache(total_blocks)
        if self._device.type == "cuda" and total_blocks:
            self._steps = self._new_steps(total_blocks)

    def warm_up(self) -> None:
        """One small step in the new cache, on a GPU: what is captured later must have run before."""
        if self._steps is not None:
            self._probe(probe_plan(1, self._block_tokens))

    def capture(self, report: Callable[[float], None]) -> None:
        """Capture CUDA graphs of small steps, where there is a GPU and one stage. All ranks together."""
        self._captures = True
        if self._steps is not None and self._mesh.pipeline.size == 1:
            self._steps.capture(self._limits.sequences, report)

    def launch(self, plan: StepPlan) -> None:
        """Run this rank's part of a step. Returns once the next rank can go on, with work still on the device."""
        self._recent.append(plan)
        with torch.inference_mode():
            if plan.scrub:
                self._cache.scrub(unpack_u32(plan.scrub).tolist())
            if self._steps is not None:
                self._launch_on_gpu(self._steps, plan)
                return
            inputs = prepare(
                plan,
                self._block_tokens,
                self._device,
                needs_rope_lengths=self._model.needs_rope_lengths,
                rows_min=ROWS_MIN,
            )
            out = self._forward(inputs, self._tokens(inputs))
            self._ends_E = np.cumsum(unpack(plan.logit_counts)) - 1
            self._drawn_N = torch.zeros(len(inputs.rows_N), dtype=torch.long, device=self._device)
            self._pass_on(out)

    def _launch_on_gpu(self, steps: CudaSteps, plan: StepPlan) -> None:
        hidden_TH = None
        if not self._mesh.is_first_stage:
            hidden_TH = self._stages.receive_hidden(len(plan.tokens) // 4)
        result = steps.run(plan, hidden_TH)
        if not self._mesh.is_last_stage:
            self._stages.send_hidden(result.out)
        elif self._mesh.is_driver:
            self._outputs.append(Output(result.out, result.best_N, result.captured))
        elif len(result.out) and self._sends_logits:
            self._send_logits(result.out)

    def _pass_on(self, out: Tensor) -> None:
        if not self._mesh.is_last_stage:
            self._stages.send_hidden(out)
            return
        logits_NV = out
        if out.shape[0]:
            logits_NV = self._mesh.tensor.all_gather(out.contiguous()).transpose(0, 1).flatten(1)
        logits_NV = logits_NV[:, : self._model.vocab_size]
        if self._mesh.is_driver:
            self._outputs.append(Output(logits_NV))
        elif out.shape[0] and self._sends_logits:
            self._send_logits(logits_NV)

    @property
    def _sends_logits(self) -> bool:
        return not self._mesh.is_first_stage and self._mesh.tensor.index == 0

    def _send_logits(self, logits_NV: Tensor) -> None:
        while len(self._sent) >= self._mesh.pipeline.size:
            self._sent.popleft().wait()
        self._sent.append(self._mesh.world.send(logits_NV.to(self._model.dtype), self._mesh.control.ranks[0]))

    def feed(self, drawn_N: Tensor) -> None:
        """Driver only: what the step launched last gave, by row of logits, for the next one to take from the device."""
        if self._steps is not None:
            self._steps.keep(drawn_N)
        else:
            self._drawn_N = drawn_N

    def finish(self, rows: int) -> Output:
        """Driver only: the logits, `rows` of them, of the oldest step launched and not finished."""
        if self._mesh.is_last_stage:
            return self._outputs.popleft()
        logits = torch.empty(rows, self._model.vocab_size, dtype=self._model.dtype, device=self._device)
        # Not over the pipeline's group: on a GPU what one group sends and receives goes in one order, and hidden states
        # that wait for room at the next stage would hold up the logits that it must get rid of first.
        return Output(self._mesh.world.receive(logits, self._mesh.pipeline.ranks[-1]) if rows else logits)

    def measure(self, tokens: int) -> tuple[float, float]:
        """Seconds that a single token takes, and a prompt of so many, in a cache of its own that is dropped again.

        All ranks together. Asserts that every attention layer comes to our function, and warms up what has to be.
        """
        if self._device.type == "cuda":
            self._choose_attention()
        self.allocate(-(-tokens // self._block_tokens))
        self._accelerate(probe_plan(min(tokens, PROBE_TOKENS_FIRST), self._block_tokens))
        self._choose_sums(probe_plan(tokens, self._block_tokens))
        one, prompt = (self._timed(probe_plan(count, self._block_tokens)) for count in (1, tokens))
        self.allocate(0)
        return one, prompt

    def _timed(self, plan: StepPlan) -> float:
        """Seconds that a plan takes when it is not the first of its size."""
        self._probe(plan)
        begun = time.perf_counter()
        self._probe(plan)
        return time.perf_counter() - begun

    def _choose_sums(self, plan: StepPlan) -> None:
        """On GPUs: whether long steps sum over tensor ranks by pieces. What that hides of a sum it takes from the
        product beside it, so with fast links it does not pay; the driver measures."""
        if self._device.type != "cuda" or self._mesh.tensor.size == 1:
            return
        # Only here: its kernels exist on hosts with a GPU alone.
        from dataplane.engine.linear_cuda import sum_by_pieces

        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(SUM_ROUNDS):
            for by_pieces, found in times.items():
                sum_by_pieces(self._model.module, by_pieces, exact=self._modes.exact)
                begun = time.perf_counter()
                self._probe(plan)
                found.append(time.perf_counter() - begun)
        whole_s, pieces_s = (min(times[by_pieces]) for by_pieces in (False, True))
        self._by_pieces = broadcast_data(self._mesh.control, pieces_s < whole_s, 0, bool)
        sum_by_pieces(self._model.module, self._by_pieces, exact=self._modes.exact)
        _log.info("sums_chosen", by_pieces=self._by_pieces, whole_s=round(whole_s, 4), pieces_s=round(pieces_s, 4))

    def _accelerate(self, plan: StepPlan) -> None:
        """Put fast modules in, once; assert that they compute what the model does.

        All ranks of the mesh make the same steps: one that outlived its group has its modules, a newcomer has not.
        """
        done = is_accelerated(self._model.module)
        if all(all_gather_data(self._mesh.control, done)):
            self._take_over()
            return
        seen: list[Tensor | None] = []
        if done:
            seen.append(self._probe(plan))
        else:
            assert_attention_reached(self._model, lambda: seen.append(self._probe(plan)), ATTENTION)
            accelerate(self._model.module, self._kit(), whole=self._mesh.pipeline.size == 1)
        self._take_over()
        if self._steps is not None:
            self._steps = self._new_steps(self._cache.total_blocks)
        before, after = seen[0], self._probe(plan)
        if before is None or after is None:
            return
        error = float((after - before).norm() / before.norm())
        assert error < FAST_ERROR_MAX, f"fast modules change the logits by {error:.3f}"

    def _kit(self) -> Kit:
        if self._device.type == "cpu":
            return CpuKit()
        # Only here: its kernels exist on hosts with a GPU alone.
        from dataplane.models.fast_layers import GpuKit

        return GpuKit(self._model.max_model_tokens)

    def _take_over(self) -> None:
        """On a GPU, let products go through what is fastest there."""
        if self._device.type == "cuda":
            from dataplane.engine.linear_cuda import take_over

            take_over(self._model.module, exact=self._modes.exact)

    def _probe(self, plan: StepPlan) -> Tensor | None:
        """The step's logits, at the driver."""
        self.launch(plan)
        logits = self.finish(1).logits_NV.float() if self._mesh.is_driver else None
        self._outputs.clear()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return logits

    def _tokens(self, inputs: StepInputs) -> Tensor:
        if inputs.fed_T is None:
            return inputs.tokens_T
        drawn_N = self._mesh.tensor.broadcast(self._drawn_N, 0)
        rows_T = torch.from_numpy(self._ends_E).to(self._device)[inputs.fed_T.clamp(min=0)]
        # A poisoned row drew -1; what is computed from it is thrown away.
        return torch.where(inputs.fed_T < 0, inputs.tokens_T, drawn_N[rows_T].clamp(min=0))

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

    def _new_cache(self, total_blocks: int) -> KVCache:
        dtype = self._modes.cache_dtype
        return KVCache(self._model.attention, total_blocks, self._block_tokens, dtype, self._device)

    def _new_steps(self, total_blocks: int) -> CudaSteps:
        # Only here: its kernels exist on hosts with a GPU alone.
        from dataplane.engine.cuda_steps import CudaSteps
        from dataplane.engine.cuda_work import ExactWork, FastWork

        per_sequence = min(-(-self._model.max_model_tokens // self._block_tokens), total_blocks)
        tables = per_sequence * self._limits.sequences
        exact, dense = self._modes.exact, self._choice.dense if self._choice is not None else None
        maker: WorkMaker = FastWork(self._device, dense=dense is not None)
        if exact:
            widest = max(4 * layer.q_heads * layer.value_dim for layer in self._model.attention)
            maker = ExactWork(self._device, widest, total_blocks * self._block_tokens)
        limits = self._limits.tokens, tables
        return CudaSteps(self._model, self._cache, self._device, *limits, self._page, maker, dense, exact=exact)

    def _choose_attention(self) -> None:
        """Find out what attends whole prompts fastest."""
        from dataplane.engine.attention_choice import choose

        layer = self._model.attention[0]
        if not self._modes.exact and self._model.dtype != torch.float32 and layer.key_dim == layer.value_dim:
            shape = layer.q_heads, layer.kv_heads, layer.key_dim
            self._choice = choose(*shape, self._model.dtype, self._modes.cache_dtype, self._device)

    @property
    def attention(self) -> str:
        """What it attends with, in words."""
        if self._choice is not None:
            return self._choice.text
        return "Triton over the paged cache" if self._device.type == "cuda" else "torch's flash kernel, by tiles"
