"""What the ranks of the matrix do. Each function runs on every rank; see tests/support/ranks.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaSpec, Sampling
from controlplane.runtime.packing import unpack_f32, unpack_u32
from dataplane.engine.book import SequenceBook
from dataplane.engine.engine import Engine
from dataplane.engine.library import Generated, submission
from dataplane.engine.plan import NO_FEEDBACK, StepPlan
from dataplane.engine.replicas import Replicas
from dataplane.engine.scheduler import BatchScheduler
from dataplane.engine.sequence import Sequence
from dataplane.models.fit import load_model
from tests.support.ranks import Ranks

CPU = torch.device("cpu")


def compare(ranks: Ranks, path: str, wanted: str, degrees: dict[str, int], **fields: Any) -> dict[str, Any]:
    """Generate greedily for the prompts in `wanted` (prompts, tokens, logits of the reference) on a mesh.

    What this rank saw: which prompts' tokens differ, the largest difference of log probabilities over the whole
    vocabulary, and how often this driver cut a prompt, preempted, fed a token back, found tokens cached.
    """
    reference = torch.load(wanted, weights_only=True)
    prompts: list[list[int]] = reference["prompts"]
    logprobs_PNV = reference["logits"].log_softmax(-1)
    count, vocabulary = logprobs_PNV.shape[1:]
    spec = ReplicaSpec(deployment=DeploymentId("matrix"), model_path=path, degrees=ParallelDegrees(**degrees), **fields)
    mesh = ranks.mesh(60.0, **degrees)
    replicas = Replicas(load_model(spec, mesh, CPU, lambda *_: None), spec, CPU)
    sampling = Sampling(temperature=0, max_tokens=count, ignore_eos=True, logprobs=vocabulary)
    with _counted() as counts:
        answers = replicas.generate([submission(n, prompt, sampling) for n, prompt in enumerate(prompts)])
    if isinstance(replicas.engine, Engine):
        counts["cached"] = sum(item.cached_tokens for item in replicas.engine.load_report().admitted)
    replicas.close()
    mesh.close()
    assert answers is not None
    different = [n for n, answer in enumerate(answers) if answer.tokens != reference["tokens"][n]]
    return {"different": different, "difference": _largest_difference(answers, logprobs_PNV), "counts": dict(counts)}


def _largest_difference(answers: list[Generated], wanted_PNV: torch.Tensor) -> float:
    """Between answers that have the same tokens."""
    largest = 0.0
    for answer, wanted_NV in zip(answers, wanted_PNV, strict=True):
        for item in answer.logprobs:
            row_V = torch.empty(wanted_NV.shape[1])
            row_V[list(unpack_u32(item.top_ids))] = torch.tensor(unpack_f32(item.top_values))
            largest = max(largest, float((row_V - wanted_NV[item.index]).abs().max()))
    return largest


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Counts what this process's scheduler does."""
    counts: Counter[str] = Counter(chunks=0, preempted=0, fed=0, cached=0)
    preempt, plan = SequenceBook.preempt, BatchScheduler.plan

    def watch_preempt(self: SequenceBook, sequence: Sequence) -> None:
        counts["preempted"] += 1
        preempt(self, sequence)

    def watch_plan(self: BatchScheduler, tokens_max: int) -> StepPlan | None:
        planned = plan(self, tokens_max)
        if planned is not None:
            counts["chunks"] += sum(not samples for samples in unpack_u32(planned.samples))
            counts["fed"] += sum(entry != NO_FEEDBACK for entry in unpack_u32(planned.feedback))
        return planned

    SequenceBook.preempt = watch_preempt  # type: ignore[method-assign]
    BatchScheduler.plan = watch_plan  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        SequenceBook.preempt = preempt  # type: ignore[method-assign]
        BatchScheduler.plan = plan  # type: ignore[method-assign]
