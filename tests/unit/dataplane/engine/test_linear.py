from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from dataplane.engine.linear import PackedMatmul, pack
from dataplane.engine.row_bits import probe_rows, probe_weight
from dataplane.parallel.tensor import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [96, 2048])
def test_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(320, width).to(dtype)
    rows = torch.randn(192, width).to(dtype)
    matmul = PackedMatmul()
    whole = matmul(rows, weight, None)
    for count in (1, 2, 3, 5, 16, 33, 100):
        for start in (0, 64):
            assert torch.equal(matmul(rows[start : start + count], weight, None), whole[start : start + count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(640, 1024), (640, 2048), (1536, 640), (512, 96), (9, 300)], ids=str)
def test_row_has_the_same_bits_where_other_orders_of_adding_show(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The first are those of Gemma 3 270M: on some processors their bits turned on the number of rows."""
    outputs, inputs = shape
    weight, rows = probe_weight(outputs, inputs, dtype), probe_rows(700, inputs, dtype)
    matmul = PackedMatmul()
    whole = matmul(rows, weight, None)
    for start, count in ((0, 1), (1, 2), (5, 7), (33, 16), (100, 33), (64, 40), (7, 65), (3, 129), (90, 520)):
        assert torch.equal(matmul(rows[start : start + count], weight, None), whole[start : start + count]), count


def test_a_choice_of_experts_does_not_turn_on_its_neighbours() -> None:
    config = AutoConfig.for_model("qwen3_moe", hidden_size=2048, num_experts=64, num_experts_per_tok=8)
    router = Qwen3MoeTopKRouter(config).to(torch.bfloat16)
    router.weight.data = probe_weight(64, 2048, torch.bfloat16)
    pack(nn.Sequential(router))
    rows = probe_rows(100, 2048, torch.bfloat16)
    whole = router(rows)
    for start, count in ((0, 1), (3, 5), (50, 16), (20, 33), (1, 99)):
        part = router(rows[start : start + count])
        assert all(torch.equal(one, all_[start : start + count]) for one, all_ in zip(part, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_is_that_of_linear(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((1, 5, 64), (48, 64), (48,)))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert torch.allclose(PackedMatmul()(x, weight, bias), F.linear(x, weight, bias), atol=tolerance, rtol=tolerance)


def test_slices_of_one_tensor_are_packed_apart() -> None:
    stacked = torch.randn(3, 16, 32)
    x = torch.randn(4, 32)
    matmul = PackedMatmul()
    for _ in range(2):
        for weight in stacked:
            assert torch.allclose(matmul(x, weight, None), F.linear(x, weight), atol=1e-5)


def test_transposed_view_is_packed_as_it_is_seen() -> None:
    weight = torch.randn(32, 16).T
    x = torch.randn(4, 32)
    assert torch.allclose(PackedMatmul()(x, weight, None), F.linear(x, weight), atol=1e-5)


def test_pack_replaces_each_product_once() -> None:
    model = nn.Sequential(Linear(torch.randn(8, 16)), nn.Linear(8, 8))
    pack(model)
    first = model[0].matmul
    assert isinstance(first, PackedMatmul)
    pack(model)
    assert model[0].matmul is first
