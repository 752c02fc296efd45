"""The engine over several ranks gives the tokens that transformers gives."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from tests.support.models import tiny_model
from tests.support.ranks import RankPool
from tests.unit.dataplane.engine.reference import greedy, mixed_prompts

TOKENS = 8
JOBS = "tests.unit.dataplane.engine.jobs"


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
    told, *others = rank_pool.run(f"{JOBS}:answers", ranks, paths=named, prompts=prompts, degrees=degrees, count=TOKENS)
    assert all(other == told for other in others)
    for path in paths:
        assert told[str(path)] == [greedy(path, prompt, TOKENS) for prompt in prompts], path.name


def test_no_rank_keeps_the_logits_of_steps_that_are_over(rank_pool: RankPool, folder: Path) -> None:
    path = tiny_model(folder, "llama")
    few, many = (
        rank_pool.run(f"{JOBS}:logits_kept", 2, path=str(path), prompts=mixed_prompts(3), count=count)
        for count in (4, 40)
    )
    assert many == few


def test_survivors_of_two_replicas_do_not_go_on_with_caches_of_different_sizes(
    rank_pool: RankPool, folder: Path
) -> None:
    path, prompts = tiny_model(folder, "llama"), mixed_prompts(4)
    told = rank_pool.run(f"{JOBS}:survivors_of_two", 4, path=str(path), prompts=prompts, count=TOKENS)
    first, _, second, _ = [rank["settled"] for rank in told]
    assert [rank["settled"] for rank in told] == [first, first, second, second]
    assert first != second
    assert [rank["alike"] for rank in told] == [[True, False, False]] * 4
    assert told[0]["tokens"] == [greedy(path, prompt, TOKENS) for prompt in prompts]
