from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dataplane.engine.linear import PackedMatmul, pack
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
