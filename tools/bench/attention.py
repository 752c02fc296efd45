"""The attention kernels alone, on a GPU."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataplane.engine.arrangement import Runs, arrange, spare_items
from tools.bench.floors import read_bandwidth, time_ms
from tools.bench.rows import Report, Row

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
DECODES = ((64, 1024), (256, 1024), (8, 8192), (1, 8192), (1, 256))
PROMPTS = ((4, 2048), (16, 512))

_CACHE_BYTES = 1 << 28
"""Caches are taken in turn, so that none is read from the L2 cache."""


def measure() -> Report:
    """Decodes, in one CUDA graph, against the time that reading the cache takes; prompts against the library."""
    device = torch.device("cuda")
    bandwidth = read_bandwidth(device)
    torch.cuda.empty_cache()
    title = f"Attention, paged by {PAGE}, {HEADS} query and {KV_HEADS} KV heads of {DIM}, bf16"
    report = Report(title, {"device": torch.cuda.get_device_name(), "bandwidth": f"{bandwidth / 1e12:.3f} TB/s"})
    for sequences, length in DECODES:
        floor_us = 1e6 * sequences * length * KV_HEADS * DIM * 4 / bandwidth
        value = _decode_us(sequences, length, device)
        report.rows.append(Row("decode", f"{sequences} × {length:,}", value, "µs", floor_us, "bandwidth"))
    for sequences, length in PROMPTS:
        flop = 2 * sequences * HEADS * DIM * length * length
        ours, library = (flop / (1e9 * ms) for ms in _prefill_ms(sequences, length, device))
        row = Row(
            "prefill", f"{sequences} × {length:,}", ours, "TFLOP/s", library, "SDPA by cuDNN", higher_is_better=True
        )
        report.rows.append(row)
    return report


def _caches(sequences: int, length: int, device: torch.device) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """As many caches as it takes to miss the L2, and block tables in random order."""
    blocks = sequences * length // PAGE
    width = PAGE * KV_HEADS * DIM
    copies = max(_CACHE_BYTES // (4 * blocks * width), 0) + 1
    caches = [
        (
            torch.randn(blocks, width, device=device, dtype=torch.bfloat16),
            torch.randn(blocks, width, device=device, dtype=torch.bfloat16),
        )
        for _ in range(copies)
    ]
    return caches, torch.randperm(blocks).to(device, torch.int32)


def _decode_us(sequences: int, length: int, device: torch.device) -> float:
    # Only here: hosts without a GPU have no Triton.
    from dataplane.kernels.decode import decode

    caches, tables = _caches(sequences, length, device)
    order = np.arange(sequences)
    runs = Runs(order * 0 + length - 1, order * 0 + 1, order, order * (length // PAGE), sequences)
    work = arrange(runs, None, spare_items(sequences, KV_HEADS), 1, may_be_dense=False)
    items, merges = (torch.from_numpy(part).to(device, torch.int32) for part in (work.items, work.merges))
    q = torch.randn(sequences, HEADS, DIM, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(q)

    def run() -> None:
        for keys, values in caches:
            decode(q, keys, values, tables, items, merges, out, KV_HEADS, PAGE, DIM**-0.5)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1000 * time_ms(graph.replay) / len(caches)


def _prefill_ms(sequences: int, length: int, device: torch.device) -> tuple[float, float]:
    """Ours over a paged cache, the library's over dense keys and values."""
    from dataplane.kernels.prefill import prefill, queries_a_tile

    caches, tables = _caches(sequences, length, device)
    order = np.arange(sequences)
    runs = Runs(order * 0, order * 0 + length, order * length, order * (length // PAGE), sequences * length)
    work = arrange(runs, None, 0, queries_a_tile(HEADS // KV_HEADS), may_be_dense=False)
    tiles = torch.from_numpy(work.tiles).to(device, torch.int32)
    q = torch.randn(sequences * length, HEADS, DIM, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(q)
    keys, values = caches[0]
    ours = time_ms(lambda: prefill(q, keys, values, tables, tiles, out, KV_HEADS, PAGE, DIM**-0.5))
    dense_q = q.view(sequences, length, HEADS, DIM).transpose(1, 2)
    dense_k, dense_v = (x.view(sequences, length, KV_HEADS, DIM).transpose(1, 2) for x in caches[0])
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        library = time_ms(
            lambda: F.scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=True, enable_gqa=True)
        )
    return ours, library
