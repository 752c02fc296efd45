"""Fixtures of the model tests: tiny models on disk, loading through a plain attention function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ReplicaSpec
from dataplane.models.fit import FittedModel, load_model
from dataplane.models.weights import Report
from dataplane.parallel.mesh import Mesh
from tests.support.attention import LENGTHS, REFERENCE, register

Load = Callable[..., FittedModel]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of this run lie."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def load() -> Load:
    """Load a folder on one rank: `load(path, report=..., **fields of the spec)`."""
    register()

    def load_one(path: Path, report: Report = lambda stage, fraction: None, **fields: Any) -> FittedModel:
        spec = ReplicaSpec(deployment=DeploymentId("test"), model_path=str(path), **fields)
        return load_model(spec, Mesh.single(), CPU, report, attention=REFERENCE)

    return load_one


def prompts(lengths: tuple[int, ...] = (23, 5, 41)) -> list[Tensor]:
    """Random token ids that every tiny model knows."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 300, (length,), generator=generator) for length in lengths]


def reference_logits(path: Path, ids: list[Tensor]) -> Tensor:
    """transformers' logits after each prompt, (N, V)."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return torch.stack([model(item[None]).logits[0, -1] for item in ids])


def our_logits(model: FittedModel, ids: list[Tensor], lengths_T: Tensor | None = None) -> Tensor:
    """Logits after each prompt, all prompts in one flat step, (N, V)."""
    LENGTHS[:] = [len(item) for item in ids]
    positions_T = torch.cat([torch.arange(len(item)) for item in ids])
    rows_N = torch.tensor(LENGTHS).cumsum(0) - 1
    with torch.no_grad():
        return model.forward(torch.cat(ids), None, positions_T, rows_N, lengths_T)
