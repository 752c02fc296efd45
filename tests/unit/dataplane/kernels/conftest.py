"""Kernel tests run on a GPU, or with Triton's interpreter on a CPU (TRITON_INTERPRET=1); else they skip."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no CUDA device")
    return torch.device("cpu")
