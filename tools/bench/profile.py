"""A decode step on a GPU, taken apart: its time, how much of it no kernel runs, and what the host needs for it."""

from __future__ import annotations

import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import Sampling
from dataplane.engine.engine import Engine
from dataplane.engine.library import submission
from tools.bench.rows import Row
from tools.bench.workloads import equal_jobs

BATCHES = (1, 64, 256)
PROMPT_TOKENS = 600

_STEPS = 20
_ANSWER_TOKENS = 80


def decode_rows(subject: str, engine: Engine) -> list[Row]:
    """Three rows a batch size."""
    rows: list[Row] = []
    for batch in BATCHES:
        _start_decoding(engine, batch)
        step_ms, host_ms = _time_steps(engine)
        gaps = _gaps(engine)
        name = f"decode of {batch} × {PROMPT_TOKENS}"
        rows.append(Row(subject, f"{name}: a step", step_ms, "ms"))
        rows.append(Row(subject, f"{name}: host's part, beside it", host_ms, "ms"))
        rows.append(Row(subject, f"{name}: no kernel runs", 100 * gaps, "%"))
    engine.reset(Epoch(0))
    return rows


def _start_decoding(engine: Engine, batch: int) -> None:
    """Bring `batch` sequences past their prompts."""
    engine.reset(Epoch(0))
    sampling = Sampling(temperature=0, max_tokens=_ANSWER_TOKENS, ignore_eos=True)
    jobs = equal_jobs(batch, PROMPT_TOKENS, _ANSWER_TOKENS)
    engine.submit([submission(number, job.prompt, sampling) for number, job in enumerate(jobs)])
    answered = 0
    while answered < 4 * batch:
        done = engine.step()
        answered += len(done.tokens) // 4 if done is not None else 0


def _time_steps(engine: Engine) -> tuple[float, float]:
    """Medians: a whole step, and what of it the host computes instead of waiting."""
    steps: list[float] = []
    hosts: list[float] = []
    for _ in range(_STEPS):
        begun, waited_s = time.perf_counter(), engine.waited_s
        engine.step()
        steps.append(time.perf_counter() - begun)
        hosts.append(steps[-1] - (engine.waited_s - waited_s))
    return 1000 * statistics.median(steps), 1000 * statistics.median(hosts)


def _gaps(engine: Engine) -> float:
    """Share of some steps' time in which the GPU runs nothing, the profiler's own cost included."""
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(_STEPS):
            engine.step()
        torch.cuda.synchronize()
    events = (event for event in run.events() or () if event.device_type.name == "CUDA")
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    first = end = spans[0][0]
    busy = 0.0
    for begin, stop in spans:
        if stop > end:
            busy += stop - max(begin, end)
            end = stop
    return 1 - busy / (end - first)
