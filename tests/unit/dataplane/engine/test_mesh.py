"""The engine over several ranks gives the tokens that transformers gives."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from tests.support.models import tiny_model
from tests.support.ranks import RankPool
from tests.unit.dataplane.engine.reference import greedy, mixed_prompts

TOKENS = 8
JOB = "tests.unit.dataplane.engine.jobs:answers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("degrees", "families"),
    [
        ({"tensor": 2}, ["llama", "gemma3_text"]),
        ({"pipeline": 2}, ["gemma3_text", "qwen3_moe"]),
        ({"tensor": 2, "pipeline": 2}, ["llama", "gemma3_text", "qwen3_moe"]),
        ({"tensor": 2, "expert": 2}, ["qwen3_moe"]),
        ({"pipeline": 4}, ["llama"]),
        ({"data": 2}, ["gemma3_text"]),
        ({"data": 2, "tensor": 2}, ["llama"]),
    ],
    ids=lambda value: "-".join(f"{axis}{size}" for axis, size in value.items()) if isinstance(value, dict) else "",
)
def test_tokens_do_not_depend_on_the_mesh(
    rank_pool: RankPool, folder: Path, degrees: dict[str, int], families: list[str]
) -> None:
    """What each degree does to what is special in a family; tests/matrix has all of all."""
    prompts = mixed_prompts(5)
    ranks = prod(size for axis, size in degrees.items() if axis != "expert")
    paths = [tiny_model(folder, family) for family in families]
    named = [str(path) for path in paths]
    told, *others = rank_pool.run(JOB, ranks, paths=named, prompts=prompts, degrees=degrees, count=TOKENS)
    assert all(other == told for other in others)
    for path in paths:
        assert told[str(path)] == [greedy(path, prompt, TOKENS) for prompt in prompts], path.name
