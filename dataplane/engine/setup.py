"""What all ranks of a replica settle together before the first step: how much they can hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from controlplane.runtime.errors import Rejected
from controlplane.runtime.messages.common import Capacity, Reason, ReasonKind, ReplicaSpec
from dataplane.engine.book import Limits
from dataplane.engine.kv_cache import block_bytes, cache_dtype
from dataplane.engine.numerics import is_exact, promise
from dataplane.engine.runner import ModelRunner, Modes, StepLimits
from dataplane.engine.sizing import cache_bytes, count_blocks
from dataplane.models.fit import FittedModel
from dataplane.parallel.collectives import all_gather_data, broadcast_data
from dataplane.parallel.groups import Group
from dataplane.parallel.mesh import Mesh
from dataplane.progress import ProgressPage

PROBE_TOKENS_CPU = 64
"""Length of the prompt that a CPU is measured with; an accelerator takes the largest step."""

LOGIT_BYTES_MAX = 1 << 28
"""Bound on the float32 logits of a step that prompt log probabilities may ask for."""

PACK_SHARE = 0.8
"""Packing weights as a share of what is done here."""

Report = Callable[[str, float], None]
"""(stage, its share done)."""


@dataclass(frozen=True, slots=True)
class Facts:
    """How a replica computes, in words for its status."""

    numerics: str
    attention: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A runner with its cache, and what was found."""

    runner: ModelRunner
    limits: Limits
    facts: Facts
    # The measured prompt, and how long it took, and a single token.
    probe_tokens: int
    probe_s: float
    token_s: float


def set_up(
    model: FittedModel, spec: ReplicaSpec, device: torch.device, page: ProgressPage | None, report: Report
) -> Ready:
    """Pack, measure a step, size the cache, allocate it. All ranks of the mesh together; they get equal limits.

    Raises Rejected if the memory of some rank does not hold one block.
    """
    largest = StepLimits(spec.max_batch_tokens, min(spec.max_sequences, spec.max_batch_tokens))
    modes = Modes(is_exact(spec.numerics, device), cache_dtype(spec.kv_cache_dtype, model.dtype, device))
    runner = ModelRunner(
        model, device, spec.block_tokens, page, lambda share: report("pack", PACK_SHARE * share), largest, modes
    )
    report("measure", PACK_SHARE)
    meet(model.mesh.control)
    probe = min(spec.max_batch_tokens, model.max_model_tokens)
    if device.type == "cpu":
        probe = min(probe, PROBE_TOKENS_CPU)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    token_s, probe_s = runner.measure(probe)
    blocks = min(all_gather_data(model.mesh.control, _count_blocks(model, spec, device, modes.cache_dtype)))
    if blocks < 1:
        text = f"no memory for a KV cache block beside the weights on {device} or a peer's device"
        raise Rejected(Reason(kind=ReasonKind.OUT_OF_MEMORY, text=text))
    runner.allocate(blocks)
    if not spec.disable_cuda_graph:
        runner.warm_up()
        runner.capture(lambda share: report("capture", PACK_SHARE + (1 - PACK_SHARE) * share))
    limits = _limits(model, spec, blocks, overlaps(spec, model.mesh, device))
    facts = Facts(promise(spec.numerics, device, model.mesh.tensor.size), runner.attention)
    return Ready(runner, limits, facts, probe, probe_s, token_s)


def overlaps(spec: ReplicaSpec, mesh: Mesh, device: torch.device) -> bool:
    """Whether a step is launched before the one before it is read. Pipeline stages are kept busy by other sequences."""
    return mesh.pipeline.size == 1 and (spec.overlap == "on" or (spec.overlap == "auto" and device.type == "cuda"))


def meet(group: Group) -> None:
    """Return once every member has come, however long the slowest one takes to load."""
    for member in range(group.size):
        broadcast_data(group, None, member, patient=True)


def agree(group: Group, settled: list[int] | None) -> bool:
    """Whether all ranks of a mesh may go on with the engines that they have: None where a rank has none, else what it
    `settled` with the ranks of its last mesh, which need not be these."""
    told = all_gather_data(group, settled)
    return settled is not None and all(item == settled for item in told)


def capacity(limits: Limits, facts: Facts) -> Capacity:
    """The limits, and how they are made use of, as a replica reports them."""
    return Capacity(
        total_blocks=limits.total_blocks,
        block_tokens=limits.block_tokens,
        max_sequences=limits.max_sequences,
        max_batch_tokens=limits.max_batch_tokens,
        max_model_tokens=limits.max_model_tokens,
        fingerprint=limits.fingerprint,
        numerics=facts.numerics,
        attention=facts.attention,
    )


def _count_blocks(model: FittedModel, spec: ReplicaSpec, device: torch.device, dtype: torch.dtype) -> int:
    if spec.kv_cache_tokens:
        return -(-spec.kv_cache_tokens // spec.block_tokens)
    step_bytes = _step_bytes(model, spec, device) if device.type == "cuda" else 0
    room = cache_bytes(device, spec.mem_fraction_static, step_bytes)
    per_block = block_bytes(model.attention, spec.block_tokens, dtype)
    return count_blocks(room, per_block, spec.block_tokens, spec.max_sequences, model.max_model_tokens)


def _step_bytes(model: FittedModel, spec: ReplicaSpec, device: torch.device) -> int:
    """Memory of the largest step beside what stays: of the measured one, as often as it fits into the largest, and the
    logits of all sequences at once, twice for what sampling makes of them and once for captured steps, which keep
    theirs."""
    peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    peak *= -(-spec.max_batch_tokens // min(spec.max_batch_tokens, model.max_model_tokens))
    torch.cuda.empty_cache()
    return peak + 3 * 4 * spec.max_sequences * model.vocab_size


def _limits(model: FittedModel, spec: ReplicaSpec, blocks: int, lookahead: bool) -> Limits:
    sequences = min(spec.max_sequences, spec.max_batch_tokens)
    return Limits(
        total_blocks=blocks,
        block_tokens=spec.block_tokens,
        max_sequences=sequences,
        max_batch_tokens=spec.max_batch_tokens,
        max_model_tokens=min(model.max_model_tokens, blocks * spec.block_tokens),
        vocab_size=model.vocab_size,
        max_logits=max(sequences, LOGIT_BYTES_MAX // (4 * model.vocab_size)),
        eos_ids=frozenset(model.eos_ids),
        fingerprint=model.weights,
        enable_prefix_cache=spec.enable_prefix_cache,
        lookahead=lookahead,
    )
