from __future__ import annotations

import os
from pathlib import Path

import pytest

from dataplane.models import page_cache
from dataplane.models.page_cache import Warmer

SIZE = 10_000
STEP = 4096


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the system is asked for, (start, length), beside being asked."""
    asked: list[tuple[int, int]] = []
    advise = os.posix_fadvise

    def watch(descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((start, length))
        advise(descriptor, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", watch)
    monkeypatch.setattr(page_cache, "STEP_BYTES", STEP)
    return asked


def test_all_of_every_file_is_asked_for(tmp_path: Path, asked: list[tuple[int, int]]) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_bytes(bytes(SIZE))
    Warmer(files).join()
    assert asked == [(0, STEP), (STEP, STEP), (2 * STEP, STEP)] * 2


def test_a_file_that_has_gone_ends_it_quietly(tmp_path: Path, asked: list[tuple[int, int]]) -> None:
    Warmer([tmp_path / "gone"]).join()
    assert asked == []
