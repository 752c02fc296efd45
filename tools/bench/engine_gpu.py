"""The engine on one GPU, beside what the GPU itself reaches; or cut over several."""

from __future__ import annotations

import gc
import platform
import statistics
from collections.abc import Sequence

import torch
import transformers

from dataplane.parallel.mesh import Mesh
from tools.bench.floors import linears_ms, read_bandwidth
from tools.bench.profile import decode_rows
from tools.bench.ranks import tensor_mesh
from tools.bench.rows import Report, Row
from tools.bench.start import median_outcome, run_jobs, start_shape, token_ms
from tools.bench.workloads import SHAPES, Job, Shape, equal_jobs, mixed_jobs

PREFILL_ROWS = 8192

_FLOOR_ROWS = (1, 64, 128, 192, 256)


def measure(
    names: Sequence[str], rounds: int, options: dict[str, object], *, tensor: int, with_profile: bool
) -> Report:
    """The three workloads for each shape in `names`, over `tensor` GPUs, and with a profile where a decode step's time
    goes."""
    device = torch.device("cuda", 0)
    bandwidth = read_bandwidth(device)
    torch.cuda.empty_cache()
    gpus = "one GPU" if tensor == 1 else f"{tensor} GPUs"
    report = Report(f"Engine on {gpus}, bf16, random weights, greedy", _conditions(bandwidth))
    with tensor_mesh(tensor, names, options) as mesh:
        for name in names:
            shape = SHAPES[name]
            report.rows.extend(_ours(name, shape, device, mesh, rounds, options, with_profile=with_profile))
            gc.collect()
            torch.cuda.empty_cache()
            if tensor == 1:
                _compare(report, name, shape, device, bandwidth)
                torch.cuda.empty_cache()
    return report


def _conditions(bandwidth: float) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(),
        "bandwidth, reading": f"{bandwidth / 1e12:.3f} TB/s",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"python {platform.python_version()}",
    }


def _ours(
    name: str,
    shape: Shape,
    device: torch.device,
    mesh: Mesh,
    rounds: int,
    options: dict[str, object],
    *,
    with_profile: bool,
) -> list[Row]:
    started = start_shape(shape, device, mesh, options)
    engine = started.engine
    one, prompts = equal_jobs(1, 128, 128), equal_jobs(32, 2048, 1)
    # What a first request of its kind sets up once is not measured.
    for jobs in (one, prompts, mixed_jobs(32)):
        run_jobs(engine, jobs)
    alone = [run_jobs(engine, one) for _ in range(3 * rounds)]
    prefill = median_outcome(engine, prompts, rounds)
    mixed = median_outcome(engine, mixed_jobs(), rounds)
    profiled = decode_rows(name, engine) if with_profile else []
    engine.close()
    return [
        Row(name, "start to ready", started.seconds, "s"),
        Row(name, "(a) 256 mixed requests", mixed.seconds, "s"),
        Row(name, "(a) 256 mixed requests", mixed.answer_rate, "tok/s", higher_is_better=True),
        Row(name, "(b) one request, a token", statistics.median(map(token_ms, alone)), "ms"),
        Row(name, "(b) first token of 128", statistics.median(1000 * item.first_s for item in alone), "ms"),
        Row(name, "(c) 32 prompts of 2,048", prefill.prompt_rate, "tok/s", higher_is_better=True),
        *profiled,
    ]


def _compare(report: Report, name: str, shape: Shape, device: torch.device, bandwidth: float) -> None:
    """Add floors to the rows of this shape."""
    step_ms = {rows: linears_ms(shape, rows, device) for rows in _FLOOR_ROWS}
    prefill_ms = linears_ms(shape, PREFILL_ROWS, device)
    floors = {
        ("(a) 256 mixed requests", "s"): _mixed_floor_s(shape, step_ms, prefill_ms / PREFILL_ROWS, bandwidth),
        ("(b) one request, a token", "ms"): 2000 * shape.parameters / bandwidth,
        ("(c) 32 prompts of 2,048", "tok/s"): 1000 * PREFILL_ROWS / prefill_ms,
    }
    what = {"s": "cuBLAS and cache reads", "ms": "reading the weights", "tok/s": "cuBLAS, no attention"}
    for index, row in enumerate(report.rows):
        floor = floors.get((row.workload, row.unit)) if row.subject == name else None
        if floor is not None:
            report.rows[index] = Row(
                name, row.workload, row.value, row.unit, floor, what[row.unit], row.higher_is_better
            )


def _mixed_floor_s(shape: Shape, step_ms: dict[int, float], prompt_token_ms: float, bandwidth: float) -> float:
    """Products of every step and prompt by cuBLAS, and each decode's read of its cache at full bandwidth."""
    jobs: list[Job] = mixed_jobs()
    longest = max(job.answer_tokens for job in jobs)
    sizes = sorted(step_ms)
    linear_ms = 0.0
    cached = 0
    for step in range(1, longest):
        running = [job for job in jobs if job.answer_tokens > step]
        linear_ms += _between(step_ms, sizes, len(running))
        cached += sum(len(job.prompt) + step for job in running)
    prompts_ms = prompt_token_ms * sum(len(job.prompt) for job in jobs)
    return (linear_ms + prompts_ms) / 1000 + cached * shape.cache_bytes_a_token / bandwidth


def _between(step_ms: dict[int, float], sizes: list[int], rows: int) -> float:
    """Interpolated between the sizes that were measured."""
    above = next(size for size in sizes if size >= rows)
    below = max((size for size in sizes if size <= rows), default=above)
    if above == below:
        return step_ms[above]
    part = (rows - below) / (above - below)
    return step_ms[below] * (1 - part) + step_ms[above] * part
