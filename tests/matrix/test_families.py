"""Greedy tokens of 64 prompts are transformers' own, and so are the logits, whatever the mesh and whatever happens.

In every case prompts are cut in chunks, prefixes come from the cache, and sequences are preempted, all at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from tests.matrix.conftest import Tell
from tests.support.ranks import RankPool

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(900)]

TOLERANCE = 1e-4

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite")
MOE = ("mixtral", "qwen3_moe")

MESHES = (
    {"tensor": 1},
    {"tensor": 2},
    {"tensor": 4},
    {"pipeline": 2},
    {"pipeline": 4},
    {"tensor": 2, "pipeline": 2},
    {"data": 2},
)
EXPERT_MESHES = (
    {"tensor": 2, "expert": 2},
    {"tensor": 4, "expert": 4},
    # Experts two ways, each expert's features over two ranks.
    {"tensor": 4, "expert": 2},
)


def name(degrees: dict[str, int]) -> str:
    return "x".join(f"{axis}{size}" for axis, size in degrees.items())


CASES = [
    pytest.param(family, degrees, id=f"{family}-{name(degrees)}")
    for family in (*DENSE, *MOE)
    for degrees in (*MESHES, *(EXPERT_MESHES if family in MOE else ()))
]


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize(("family", "degrees"), CASES)
def test_tokens_and_logits_are_those_of_transformers(
    family: str,
    degrees: dict[str, int],
    overlap: str,
    ranks: RankPool,
    reference: Callable[[str], tuple[Path, Path]],
    tell: Tell,
) -> None:
    model, wanted = reference(family)
    found = ranks.run(
        "tests.matrix.jobs:compare",
        prod(size for axis, size in degrees.items() if axis != "expert"),
        timeout_s=600,
        path=str(model),
        wanted=str(wanted),
        degrees=degrees,
        overlap=overlap,
        # Room for about four of the 64.
        kv_cache_tokens=360,
        block_tokens=4,
        max_batch_tokens=64,
        max_sequences=12,
        max_model_tokens=200,
    )
    counts: Counter[str] = Counter()
    for rank in found:
        counts.update(rank["counts"])
    happened = ", ".join(f"{counts[what]} {what}" for what in ("chunks", "cached", "preempted", "fed"))
    tell(
        f"{family:12} {name(degrees):18} overlap {overlap:3}  {64 - len(found[0]['different'])}/64 equal, "
        f"logits within {found[0]['difference']:.1e}  ({happened})"
    )
    assert found[0]["different"] == []
    assert found[0]["difference"] < TOLERANCE
    assert counts["chunks"] > 0
    assert counts["cached"] > 0
    assert counts["preempted"] > 0
    # Stages have steps of different sequences in flight instead.
    assert (counts["fed"] > 0) == (overlap == "on" and degrees.get("pipeline", 1) == 1)
