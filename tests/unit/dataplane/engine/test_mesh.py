"""The engine over several ranks gives the tokens that transformers gives."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest

from tests.support.models import tiny_model
from tests.support.ranks import RankPool
from tests.unit.dataplane.engine.reference import greedy, mixed_prompts

JOB = "tests.unit.dataplane.engine.jobs:answers"
FAMILIES = ("llama", "gemma3_text", "qwen3_moe")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with RankPool(4, tmp_path_factory.mktemp("ranks") / "log") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [tiny_model(folder, family) for family in FAMILIES]


@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor": 2},
        {"pipeline": 2},
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "expert": 2},
        {"pipeline": 4},
        {"data": 2},
        {"data": 2, "tensor": 2},
    ],
    ids=lambda degrees: "-".join(f"{axis}{size}" for axis, size in degrees.items()),
)
def test_tokens_do_not_depend_on_the_mesh(pool: RankPool, models: list[Path], degrees: dict[str, int]) -> None:
    prompts = mixed_prompts(7)
    ranks = prod(size for axis, size in degrees.items() if axis != "expert")
    paths = [str(path) for path in models]
    told, *others = pool.run(JOB, ranks, paths=paths, prompts=prompts, degrees=degrees, count=12)
    assert all(other == told for other in others)
    for path in models:
        assert told[str(path)] == [greedy(path, prompt, 12) for prompt in prompts], path.name
