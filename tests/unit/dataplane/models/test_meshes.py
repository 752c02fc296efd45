"""Every family on every kind of mesh gives transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import FAMILIES, MOE_FAMILIES, tiny_model
from tests.support.ranks import RankPool
from tests.unit.dataplane.models.conftest import prompts, reference_logits

JOBS = "tests.unit.dataplane.models.jobs"
TOLERANCE = 1e-4
IDS = [item.tolist() for item in prompts()]


@pytest.fixture(scope="module")
def wanted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' logits of all families, by folder."""
    path = tmp_path_factory.mktemp("wanted") / "logits.pt"
    folders = [tiny_model(models, family) for family in FAMILIES]
    torch.save({str(folder): reference_logits(folder, prompts()) for folder in folders}, path)
    return path


@pytest.mark.parametrize(
    ("families", "degrees"),
    [
        (list(FAMILIES), {"tensor": 2}),
        (list(FAMILIES), {"tensor": 4}),
        (list(FAMILIES), {"pipeline": 2}),
        (list(FAMILIES), {"pipeline": 4}),
        (list(FAMILIES), {"tensor": 2, "pipeline": 2}),
        (list(MOE_FAMILIES), {"tensor": 2, "expert": 2}),
        (list(MOE_FAMILIES), {"tensor": 4, "expert": 4}),
        (list(MOE_FAMILIES), {"tensor": 4, "expert": 2}),
        (list(MOE_FAMILIES), {"tensor": 2, "expert": 2, "pipeline": 2}),
    ],
    ids=lambda value: "x".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_logits_equal_transformers(
    families: list[str], degrees: dict[str, int], models: Path, wanted: Path, rank_pool: RankPool
) -> None:
    size = degrees.get("tensor", 1) * degrees.get("pipeline", 1)
    paths = {family: str(tiny_model(models, family)) for family in families}
    results: list[dict[str, Any]] = rank_pool.run(
        f"{JOBS}:differences", size, paths=list(paths.values()), wanted=str(wanted), prompts=IDS, degrees=degrees
    )
    worst = {
        family: [result[path]["difference"] for result in results if result[path]["difference"] is not None]
        for family, path in paths.items()
    }
    # The last stage has logits, on each of its tensor ranks.
    assert all(len(found) == degrees.get("tensor", 1) for found in worst.values())
    assert {family: max(found) for family, found in worst.items() if not max(found) < TOLERANCE} == {}
