"""The matrix: every family on every mesh, against transformers. Minutes of computing: `pytest -m matrix` runs it.

What each test found is printed at the end as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.matrix.reference import write_reference
from tests.support.models import tiny_model
from tests.support.ranks import RankPool

FOUND = pytest.StashKey[list[str]]()

Tell = Callable[[str], None]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[FOUND]:
        terminalreporter.section("matrix")
    for line in config.stash[FOUND]:
        terminalreporter.write_line(line)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Adds a line to the table."""
    return request.config.stash[FOUND].append


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four processes that run jobs as ranks."""
    with RankPool(4, tmp_path_factory.mktemp("ranks") / "log") as pool:
        yield pool


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """By family: a tiny model's folder, and the file of what transformers makes of it."""
    folder = tmp_path_factory.mktemp("matrix")

    @cache
    def make(family: str) -> tuple[Path, Path]:
        model, told = tiny_model(folder, family), folder / f"{family}.pt"
        write_reference(model, told)
        return model, told

    return make
