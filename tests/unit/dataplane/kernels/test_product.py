"""Products against float64, and a row's bits against those that it has in other company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

SIZES = [(96, 64), (200, 72), (1000, 320)]


def numbers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def types(device: torch.device) -> list[torch.dtype]:
    # The interpreter has no bfloat16 product.
    return [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16, torch.float16]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits; the interpreter's products add up as numpy likes."""
    return torch.equal(a, b) if a.is_cuda else torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_rows_have_the_same_bits_in_any_company(device: torch.device, outputs: int, inputs: int) -> None:
    from dataplane.kernels.product import product

    counts = (1, 2, 5, 17) if device.type == "cpu" else (1, 2, 5, 17, 40, 64, 100, 300, 700, 1500)
    for dtype in types(device):
        x, weight = (
            numbers(counts[-1], inputs, device=device, dtype=dtype),
            numbers(outputs, inputs, device=device, dtype=dtype),
        )
        bias = numbers(outputs, device=device, dtype=dtype)
        whole = product(x, weight, bias)
        wanted = x.double() @ weight.double().T + bias.double()
        assert error(whole, wanted) < (2e-6 if dtype == torch.float32 else 5e-3)
        for count in counts:
            assert same(product(x[:count], weight, bias), whole[:count]), (dtype, count)
            assert same(product(x[-count:], weight, bias), whole[-count:]), (dtype, count)


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_of_any_size(device: torch.device, transposed: bool) -> None:
    """Empty groups, and rows behind the last one; bits as in the plain product."""
    from dataplane.kernels.product import grouped_product, product

    sizes, outputs, inputs = [3, 0, 20, 1, 0, 7], 72, 48
    ends = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
    for dtype in types(device):
        x = numbers(40, inputs, device=device, dtype=dtype)
        stacked = numbers(len(sizes), outputs, inputs, device=device, dtype=dtype)
        weight_EIO = stacked.transpose(1, 2)
        weight_EIO = weight_EIO.contiguous() if transposed else weight_EIO
        bias = numbers(len(sizes), outputs, device=device, dtype=dtype)
        got = grouped_product(x, weight_EIO, ends, bias)
        start = 0
        for group, size in enumerate(sizes):
            if size:
                part = product(x[start : start + size], stacked[group], bias[group])
                assert same(got[start : start + size], part), (dtype, group)
            start += size


def test_row_sums(device: torch.device) -> None:
    from dataplane.kernels.sums import row_sums

    x = numbers(7, 3, 1000, device=device, dtype=torch.float32)
    assert error(row_sums(x, 1000.0), x.double().mean(-1)) < 2e-6
    assert torch.equal(row_sums(x)[3:4], row_sums(x[3:4]))
