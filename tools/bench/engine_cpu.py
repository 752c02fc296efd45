"""The engine on a CPU with a real small model, in turn with its peer."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from dataplane.engine.engine import Engine
from dataplane.models.demo import resolve_model
from tools.bench.profile_cpu import decode_rows
from tools.bench.rows import Report, Row
from tools.bench.start import run_jobs, start
from tools.bench.workloads import Job, equal_jobs, mixed_jobs

STATIC_BATCH = 16
"""Requests that the peer runs at a time."""


def measure(model: str, rounds: int, *, with_peer: bool, overlap: str, with_profile: bool) -> Report:
    """One request, 16 equal ones and a queue of 64 mixed ones, `rounds` times each, medians, the engines in turn; with
    a profile where a decode step's time goes.

    We batch as many sequences as a replica does by default, and the queue also as few as the peer, which runs
    `STATIC_BATCH` at a time: in a static batch all wait for the longest.
    """
    folder = resolve_model(model, lambda *_: None)
    options = {"dtype": "bfloat16", "kv_cache_tokens": 16_384, "overlap": overlap}
    usual = start(folder, torch.device("cpu"), **options)
    narrow = start(folder, torch.device("cpu"), max_sequences=STATIC_BATCH, **options)
    peer = _peer(str(folder)) if with_peer else None
    conditions = {
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    report = Report(f"Engine on a CPU, {model}, bf16, greedy", conditions)
    mixed = mixed_jobs(64, 8, 96)
    workloads = (
        (equal_jobs(1, 32, 48), {"one request": usual.engine}),
        (equal_jobs(STATIC_BATCH, 32, 48), {"16 equal requests": usual.engine}),
        (mixed, {"queue of 64 mixed": usual.engine, "queue of 64 mixed, 16 at a time": narrow.engine}),
    )
    for jobs, engines in workloads:
        report.rows.extend(_compare(model, jobs, engines, peer, rounds))
    if with_profile:
        report.rows.extend(decode_rows(model, usual.engine, usual.model))
    return report


def _compare(
    model: str, jobs: list[Job], engines: dict[str, Engine], peer: Callable[[list[Job]], float] | None, rounds: int
) -> list[Row]:
    """A row for each of `engines`, by the name of what it does."""
    # What a first request sets up once is measured on neither side.
    for engine in engines.values():
        run_jobs(engine, jobs[:1])
    if peer is not None:
        peer(jobs[:1])
    ours: dict[str, list[float]] = {name: [] for name in engines}
    theirs: list[float] = []
    for _ in range(rounds):
        for name, engine in engines.items():
            ours[name].append(run_jobs(engine, jobs).answer_rate)
        if peer is not None:
            theirs.append(peer(jobs))
    against = statistics.median(theirs) if theirs else None
    return [
        Row(model, name, statistics.median(rates), "tok/s", against, "transformers.generate", higher_is_better=True)
        for name, rates in ours.items()
    ]


def _peer(folder: str) -> Callable[[list[Job]], float]:
    """transformers.generate over static batches: answer tokens that were asked for, a second."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def run(jobs: list[Job]) -> float:
        begun = time.perf_counter()
        for first in range(0, len(jobs), STATIC_BATCH):
            batch = jobs[first : first + STATIC_BATCH]
            longest = max(len(job.prompt) for job in batch)
            ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in batch])
            mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
            answer = max(job.answer_tokens for job in batch)
            with torch.inference_mode():
                model.generate(ids, attention_mask=mask, max_new_tokens=answer, do_sample=False, pad_token_id=0)
        return sum(job.answer_tokens for job in jobs) / (time.perf_counter() - begun)

    return run
