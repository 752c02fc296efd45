"""What a replica promises about its text."""

from __future__ import annotations

import pytest
import torch

from controlplane.runtime.errors import Rejected
from dataplane.engine.kv_cache import FP8, cache_dtype
from dataplane.engine.numerics import is_exact, promise

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_exact_costs_nothing_on_a_cpu_and_is_an_option_on_a_gpu() -> None:
    assert all(is_exact(word, CPU) for word in ("auto", "exact", "fast"))
    assert [is_exact(word, GPU) for word in ("auto", "exact", "fast")] == [False, True, False]
    with pytest.raises(Rejected, match="numerics 'quick' is none of auto, exact, fast"):
        is_exact("quick", GPU)


def test_the_promise_says_where_it_ends() -> None:
    assert promise("auto", CPU, 4).startswith("exact: ")
    assert promise("auto", GPU, 1).startswith("fast: ")
    assert promise("exact", GPU, 1) == promise("auto", CPU, 1)
    assert "NCCL" in promise("exact", GPU, 2)


def test_an_unknown_cache_type_is_refused_by_name() -> None:
    assert cache_dtype("auto", torch.float16, CPU) == torch.float16
    assert cache_dtype("fp8_e4m3", torch.float16, CPU) == FP8
    with pytest.raises(Rejected, match="kv_cache_dtype 'int4' is neither auto nor fp8_e4m3"):
        cache_dtype("int4", torch.float16, CPU)
