"""On a CPU fast modules take the place of what they compute, give the same logits, and each row the same bits in any
batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ReplicaSpec
from dataplane.engine.attention import running
from dataplane.engine.attention_cpu import CpuAttentionStep
from dataplane.engine.inputs import prepare
from dataplane.engine.kv_cache import KVCache
from dataplane.engine.linear import PackedMatmul
from dataplane.engine.plan import probe_plan
from dataplane.models.accelerate import accelerate
from dataplane.models.cpu_layers import CpuKit, CpuMLP, CpuNorm, turned
from dataplane.models.fit import FittedModel, load_model
from dataplane.models.recognise import ACTIVATIONS, NORMS, TURNS, NormFacts
from dataplane.parallel.mesh import Mesh
from dataplane.parallel.tensor import Linear
from tests.support.models import FAMILIES, tiny_model

CPU = torch.device("cpu")
TOKENS, PAGE = 21, 16
DTYPES = [torch.float32, torch.bfloat16]

# (attention modules, feed-forward modules, layers) that are replaced, of four.
WANTED = {
    "llama": (4, 4, 4),
    "mistral": (4, 4, 4),
    "qwen2": (4, 4, 4),
    "qwen3": (4, 4, 4),
    "gemma2": (4, 4, 4),
    "gemma3_text": (4, 4, 4),
    "mixtral": (4, 0, 4),
    "qwen3_moe": (4, 1, 4),
    "granite": (4, 4, 0),
    "phi3": (0, 4, 0),
    "gpt_oss": (0, 0, 0),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_stay(tmp_path: Path, family: str) -> None:
    spec = ReplicaSpec(deployment=DeploymentId("d"), model_path=str(tiny_model(tmp_path, family)), dtype="float32")
    model = load_model(spec, Mesh.single(), CPU, lambda *_: None)
    before = logits(model)
    done = accelerate(model.module, CpuKit(), whole=True)
    if family in WANTED:
        assert (done.attention, done.feed_forward, done.layers) == WANTED[family]
    assert float((logits(model) - before).norm() / before.norm()) < 1e-5


def logits(model: FittedModel) -> Tensor:
    """Of a prompt."""
    cache = KVCache(model.attention, 2, PAGE, model.dtype, CPU)
    inputs = prepare(probe_plan(TOKENS, PAGE), PAGE, CPU, needs_rope_lengths=model.needs_rope_lengths)
    tokens_T = (torch.arange(TOKENS) * 7 + 3) % 323
    with torch.inference_mode(), running(CpuAttentionStep(cache, inputs)):
        return model.forward(tokens_T, None, inputs.positions_T, slice(None), inputs.rope_lengths_T)


def assert_rows_stay(call: object, *inputs: Tensor) -> Tensor:
    """Each row of `call`'s result is the same in batches of other sizes and places. Returns that of all rows."""
    assert callable(call)
    whole = call(*inputs)
    for count in (4, 5, 16, 33):
        for start in (0, 7):
            part = call(*(x[start : start + count] for x in inputs))
            assert torch.equal(part, whole[start : start + count]), (count, start)
    return whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", range(len(NORMS)))
@pytest.mark.parametrize("shape", [(64,), (640,), (2049,), (5, 24)])
def test_a_norm_is_its_classs_formula(shape: tuple[int, ...], kind: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, *shape).mul(3).to(dtype), torch.rand(*shape).to(dtype)
    got = assert_rows_stay(CpuNorm(weight, NormFacts(1e-6, kind)), x)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert torch.allclose(got, NORMS[kind](normed, weight, dtype), rtol=tolerance, atol=tolerance)
    assert got.dtype == dtype


def test_heads_that_are_part_of_a_row_are_normed_alike() -> None:
    rows = torch.randn(64, 7, 24)
    norm = CpuNorm(torch.rand(5, 24), NormFacts(1e-6, 0))
    assert torch.equal(assert_rows_stay(norm, rows[:, :5]), norm(rows[:, :5].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", TURNS)
@pytest.mark.parametrize("rotated", [16, 20])
def test_a_rotation_is_its_formula(rotated: int, layout: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, cos, sin = (torch.randn(64, *shape).to(dtype) for shape in ((5, 20), (1, rotated), (1, rotated)))
    signs = torch.ones(rotated)
    signs[: rotated // 2] = -1
    if layout == 2:
        signs = torch.tensor([-1.0, 1.0]).repeat(rotated // 2)
    got = assert_rows_stay(lambda *args: turned(*args, layout), x, cos, sin * signs.to(dtype))
    wanted = torch.cat((TURNS[layout](x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_a_feed_forward_module_is_its_formula(activation: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    up, down = Linear(torch.randn(2 * 96, 64).to(dtype) / 8), Linear(torch.randn(64, 96).to(dtype) / 10)
    for linear in (up, down):
        linear.matmul = PackedMatmul()
    x = torch.randn(64, 64).to(dtype)
    got = assert_rows_stay(CpuMLP(up, down, activation), x)
    gate, partner = up(x).chunk(2, dim=-1)
    assert torch.equal(got, down(ACTIVATIONS[activation](gate) * partner))
