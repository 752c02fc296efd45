"""The engine over several GPUs gives the tokens that transformers gives, and outlives the loss of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from controlplane.runtime.messages.common import ParallelDegrees
from dataplane.parallel.mesh import world_size
from tests.support.models import tiny_model
from tests.support.ranks import RankPool
from tests.unit.dataplane.engine.reference import greedy, mixed_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

TOKENS = 12
JOBS = "tests.unit.dataplane.engine.jobs"
MESHES = [
    {"tensor": 2},
    {"tensor": 2, "expert": 2},
    {"pipeline": 2},
    {"tensor": 4},
    {"tensor": 4, "expert": 2},
    {"tensor": 2, "pipeline": 2},
]


def on_enough_gpus(degrees: dict[str, int]) -> Any:
    missing, enough = torch.cuda.device_count() < ranks_of(degrees), {2: "two", 4: "four"}[ranks_of(degrees)]
    name = "-".join(f"{axis}{n}" for axis, n in degrees.items())
    return pytest.param(
        degrees, id=name, marks=pytest.mark.skipif(missing, reason=f"there are no {enough} CUDA devices")
    )


def ranks_of(degrees: dict[str, int]) -> int:
    return world_size(ParallelDegrees(**degrees))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("disable_cuda_graph", [False, True])
@pytest.mark.parametrize("degrees", [on_enough_gpus(degrees) for degrees in MESHES])
def test_tokens_do_not_depend_on_the_mesh(
    rank_pool: RankPool, folder: Path, degrees: dict[str, int], disable_cuda_graph: bool
) -> None:
    families = ["qwen3_moe"] if "expert" in degrees else ["llama", "gemma3_text", "qwen3_moe"]
    paths = [tiny_model(folder, family) for family in families]
    prompts = mixed_prompts(6)
    options = {"disable_cuda_graph": disable_cuda_graph}
    named = [str(path) for path in paths]
    arguments = {"degrees": degrees, "count": TOKENS, "kind": "cuda", "options": options}
    told, *others = rank_pool.run(f"{JOBS}:answers", ranks_of(degrees), paths=named, prompts=prompts, **arguments)
    assert others == [told] * len(others)
    for path in paths:
        assert told[str(path)] == [greedy(path, prompt, TOKENS) for prompt in prompts], path.name


def test_a_gpu_outlives_the_loss_of_another(rank_pool: RankPool, folder: Path) -> None:
    path = tiny_model(folder, "llama")
    prompts = mixed_prompts(4)
    driver, _ = rank_pool.run(f"{JOBS}:regrouped", 2, path=str(path), prompts=prompts, count=TOKENS)
    expected = [greedy(path, prompt, TOKENS) for prompt in prompts]
    assert driver == {"first": expected, "second": expected, "lost": "aborted"}
