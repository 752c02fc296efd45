"""What the GPU itself reaches: memory bandwidth, and a model's products alone. Medians, in CUDA events' time."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tools.bench.workloads import Shape

_REPEATS = 20


def time_ms(call: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Median time of `call` on the device, after three calls to warm up."""
    for _ in range(3):
        call()
    times: list[float] = []
    for _ in range(repeats):
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended))
    return statistics.median(times)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a kernel that only reads: the sum of 4 GiB."""
    values = torch.ones(1 << 30, dtype=torch.float32, device=device)
    return values.numel() * 4 / (time_ms(values.sum) / 1000)


def linears_ms(shape: Shape, rows: int, device: torch.device) -> float:
    """A step's products alone, by cuBLAS from one CUDA graph, each with weights of its own."""
    weights = [torch.randn(size, dtype=torch.bfloat16, device=device) * 0.02 for size in shape.linears()]
    inputs = {i: torch.randn(rows, i, dtype=torch.bfloat16, device=device) for i in {w.shape[1] for w in weights}}

    def products() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    products()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products()
    return time_ms(graph.replay)
