"""Norms, activations, rotation with the write to the cache, arg-max and feedback, against their formulas in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dataplane.engine.kv_cache import FP8, quantise
from dataplane.models.recognise import ACTIVATIONS, NORMS, turn_halves, turn_pairs

pytestmark = pytest.mark.gpu


def close(got: Tensor, wanted: Tensor) -> bool:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm()) < 2e-6


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("width", [64, 1000])
def test_norm_and_residual(device: torch.device, kind: int, width: int) -> None:
    from dataplane.kernels.norm import add_rms_norm, rms_norm

    x, delta, weight = (torch.randn(*shape, device=device) for shape in ((5, width), (5, width), (width,)))

    def formula(x: Tensor) -> Tensor:
        return NORMS[kind](x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), weight, x.dtype)

    assert close(rms_norm(x, weight, 1e-6, kind), formula(x))
    stream, normed = add_rms_norm(x, delta, weight, 1e-6, kind)
    assert close(stream, x + delta)
    assert close(normed, formula(x + delta))


@pytest.mark.parametrize("activation", [0, 1, 2])
def test_gate(device: torch.device, activation: int) -> None:
    from dataplane.kernels.gated import gated

    x = torch.randn(3, 2 * 1100, device=device)
    gate, up = x.chunk(2, dim=-1)
    assert close(gated(x, activation), ACTIVATIONS[activation](gate) * up)


@pytest.mark.parametrize("layout", [0, 1, 2])
@pytest.mark.parametrize("rotated", [16, 80])
@pytest.mark.parametrize("normed", [False, True])
def test_place_turns_and_stores(device: torch.device, layout: int, rotated: int, normed: bool) -> None:
    from dataplane.kernels.rotary import HeadNorm, place

    tokens, heads, kv_heads, dim, page = 5, 12, 3, 80, 16
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = torch.randn(tokens, rotated, device=device), torch.randn(tokens, rotated, device=device)
    weights = torch.randn(2, dim, device=device)
    norms = (HeadNorm(weights[0], 1e-6, 0), HeadNorm(weights[1], 1e-6, 0)) if normed else None
    slots = torch.tensor([3, 17, -1, 0, 40], dtype=torch.int32, device=device)
    caches = [torch.zeros(3, kv_heads * page * dim, device=device) for _ in range(2)]
    got_q, got_k = place(
        q, k, v, slots, caches[0], caches[1], page,
        turn=(cos, sin), layout=layout, norms=norms, keep_k=layout > 0 or normed,
    )  # fmt: skip

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        if normed:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
        if layout == 0:
            return x
        turn = turn_halves if layout == 1 else turn_pairs
        return torch.cat((turn(x[..., :rotated], cos[:, None], sin[:, None]), x[..., rotated:]), -1)

    assert close(got_q, formula(q, weights[0]))
    assert close(got_k, formula(k, weights[1]))
    for cache, rows in ((caches[0], formula(k, weights[1])), (caches[1], v)):
        stored = cache.view(3, kv_heads, page, dim)
        wanted = torch.zeros_like(stored)
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                wanted[slot // page, :, slot % page] = rows[row]
        assert close(stored, wanted)


def test_place_stores_8_bit_floats(device: torch.device) -> None:
    """The same bits and exponents as the cache of a CPU has."""
    from dataplane.kernels.rotary import place

    tokens, heads, dim, page = 7, 3, 80, 16
    scales = torch.tensor([1e-30, 1e-3, 0.0, 1.0, 300.0, 7e4, 1e30], device=device).view(-1, 1, 1)
    q, k, v = (torch.randn(tokens, heads, dim, device=device) * scales for _ in range(3))
    slots = torch.tensor([3, 17, 5, 0, 40, 41, 42], dtype=torch.int32, device=device)
    bits = [torch.zeros(3, heads * page * dim, dtype=torch.uint8, device=device) for _ in range(2)]
    exponents = [torch.zeros(3, heads * page, dtype=torch.int8, device=device) for _ in range(2)]
    place(
        q, k, v, slots, bits[0].view(FP8), bits[1].view(FP8), page, exponents=(exponents[0], exponents[1])
    )  # fmt: skip
    for stored, powers, rows in zip(bits, exponents, (k, v), strict=True):
        wanted_bits, wanted_powers = quantise(rows.cpu())
        for row, slot in enumerate(slots.tolist()):
            at = slot // page, slice(None), slot % page
            assert torch.equal(powers.view(3, heads, page)[at].cpu(), wanted_powers[row])
            assert torch.equal(stored.view(3, heads, page, dim)[at].cpu(), wanted_bits[row])


@pytest.mark.parametrize("shape", [(5, 40), (300, 1024), (1500, 2500)])
@pytest.mark.parametrize("biased", [False, True])
def test_matrix_times_vector(device: torch.device, shape: tuple[int, int], biased: bool) -> None:
    from dataplane.kernels.gemv import gemv

    x, weight, bias = (torch.randn(*size, device=device) for size in (shape[1:], shape, shape[:1]))
    wanted = weight.double() @ x.double() + (bias.double() if biased else 0)
    assert close(gemv(x, weight, bias if biased else None), wanted)


def test_greedy_takes_the_first_of_equals_and_marks_what_is_no_number(device: torch.device) -> None:
    from dataplane.kernels.greedy import greedy

    logits = torch.randn(5, 9001, device=device)[:, :9000]
    logits[0, 8192] = logits[0, 77] = 50
    logits[1, 4095] = 50
    logits[2, 3] = float("nan")
    logits[3] = float("-inf")
    out = torch.full((8,), 7, dtype=torch.int64, device=device)
    got = greedy(logits, out)
    assert got.tolist() == [77, 4095, -1, -1, int(logits[4].argmax())]
    assert out[5:].tolist() == [7, 7, 7]


def test_feed_takes_tokens_from_the_step_before(device: torch.device) -> None:
    from dataplane.kernels.feed import feed

    tokens = torch.arange(10, 610, dtype=torch.int32, device=device)
    fed = torch.full((600,), -1, dtype=torch.int32, device=device)
    fed[1], fed[2], fed[599] = 2, 0, 1
    drawn = torch.tensor([5, -1, 9], dtype=torch.int64, device=device)
    wanted = tokens.tolist()
    wanted[1], wanted[2], wanted[599] = 9, 5, 0
    assert feed(tokens, fed, drawn).tolist() == wanted
