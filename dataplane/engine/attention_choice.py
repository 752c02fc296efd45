"""What whole prompts are attended with on a GPU: the fastest of what is here, found once at start by trying.

Our kernels over the paged cache serve everything. A prompt without a cached prefix has all its keys and values at hand,
and a library's dense kernel may be faster: SDPA with cuDNN's or FlashAttention-2's kernel, which every torch has, or
FlashAttention 3 or FlashInfer where somebody installed them. One that fails, or computes something else, is passed by.

Shape letters: B prompts, S tokens of each, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataplane.engine.arrangement import DENSE_TOKENS, Runs, arrange
from dataplane.engine.kv_cache import FP8
from dataplane.kernels.prefill import prefill, queries_a_tile

Dense = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q (B, S, H, D), k, v (B, S, K, D), scale) -> (B, S, H, D), causal."""

OURS = "Triton over the paged cache"

_ROUNDS = 5
_ERROR_MAX = 0.02
"""Relative difference of results in half precision."""

_PROMPTS, _TOKENS = 4, 2 * DENSE_TOKENS

_PAGE = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why."""

    # None: our own kernel.
    dense: Dense | None
    # With all that was tried, in µs.
    text: str


def choose(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device
) -> Choice:
    """Time prompts of a usual step by each; our kernel over a cache of `cache_dtype`."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((_PROMPTS, _TOKENS, count, dim) for count in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    wanted = _ours(q, k, v, dtype)()
    times = {OURS: _time_us(_ours(q, k, v, cache_dtype))}
    found: dict[str, Dense] = {}
    for name, dense in _candidates():
        try:
            error = float((dense(q, k, v, dim**-0.5) - wanted).norm() / wanted.norm())
        except (RuntimeError, ValueError, TypeError, AttributeError, OSError):
            # A package for another GPU or another torch.
            continue
        if error < _ERROR_MAX:
            found[name] = dense
            times[name] = _time_us(lambda dense=dense: dense(q, k, v, dim**-0.5))
    best = min(times, key=lambda name: times[name])
    tried = ", ".join(f"{name} {us:.0f} µs" for name, us in sorted(times.items(), key=lambda item: item[1]))
    return Choice(found.get(best), f"prompts by {best} ({tried}), the rest by {OURS}")


def _candidates() -> Iterator[tuple[str, Dense]]:
    yield "SDPA by cuDNN", _sdpa(SDPBackend.CUDNN_ATTENTION)
    yield "SDPA by FlashAttention 2", _sdpa(SDPBackend.FLASH_ATTENTION)
    if find_spec("flash_attn_interface") is not None:
        yield "FlashAttention 3", _flash_attention_3
    if find_spec("flashinfer") is not None:
        yield "FlashInfer", _flashinfer


def _sdpa(backend: SDPBackend) -> Dense:
    def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    return dense


def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = import_module("flash_attn_interface").flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    return out[0] if isinstance(out, tuple) else out


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    attend = import_module("flashinfer").single_prefill_with_kv_cache
    return torch.stack([attend(*item, causal=True, sm_scale=scale) for item in zip(q, k, v, strict=True)])


def _ours(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, cache_dtype: torch.dtype) -> Callable[[], Tensor]:
    """Our kernel over a cache that holds these keys and values already."""
    prompts, tokens, heads, dim = q_BSHD.shape
    kv_heads = k_BSKD.shape[2]
    order = np.arange(prompts)
    runs = Runs(0 * order, 0 * order + tokens, tokens * order, tokens // _PAGE * order, prompts * tokens)
    work = arrange(runs, None, 0, queries_a_tile(heads // kv_heads), may_be_dense=False)
    tiles = torch.from_numpy(work.tiles).to(q_BSHD.device, torch.int32)
    tables = torch.arange(prompts * tokens // _PAGE, dtype=torch.int32, device=q_BSHD.device)
    keys, values = (x.flatten(0, 1).unflatten(0, (-1, _PAGE)).transpose(1, 2).contiguous() for x in (k_BSKD, v_BSKD))
    out = torch.empty_like(q_BSHD)
    # Ones: what the values are does not matter to the time.
    one = torch.zeros(keys.shape[:-1], dtype=torch.int8, device=keys.device)
    exponents = (one, one) if cache_dtype == FP8 else None
    keys, values = keys.to(cache_dtype), values.to(cache_dtype)

    def run() -> Tensor:
        q, mixed = q_BSHD.flatten(0, 1), out.flatten(0, 1)
        prefill(q, keys, values, tables, tiles, mixed, kv_heads, _PAGE, dim**-0.5, exponents=exponents)
        return out

    return run


def _time_us(call: Callable[[], object]) -> float:
    """Median time on the device."""
    call()
    times: list[float] = []
    for _ in range(_ROUNDS):
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(1000 * begun.elapsed_time(ended))
    return statistics.median(times)
