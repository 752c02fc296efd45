"""Fixtures of the data plane's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four processes that run jobs as ranks, started once."""
    with RankPool(4, tmp_path_factory.mktemp("ranks") / "log") as pool:
        yield pool
