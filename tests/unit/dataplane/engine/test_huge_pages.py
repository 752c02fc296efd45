"""Memory moves into huge pages as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dataplane.engine import huge_pages
from dataplane.engine.huge_pages import Move, covering, page_bytes


def test_pages_are_counted_once() -> None:
    ranges = [(4000, 200), (1000, 100), (2100, 800), (1900, 150)]
    assert covering(ranges, 1000) == [(1000, 3000), (4000, 5000)]
    assert covering([], 1000) == []


@pytest.mark.skipif(not page_bytes(), reason="a system without huge pages")
def test_memory_is_moved_bit_by_bit_and_stays_what_it_was() -> None:
    values = torch.arange(16 * page_bytes() // 4, dtype=torch.int32)
    kept = values.clone()
    move = Move([(values.data_ptr(), values.numel() * 4)])
    before = _huge_kib()
    # Beyond the end: nothing is left to do.
    for _ in range(20):
        move.go_on()
    assert torch.equal(values, kept)
    if _can_collapse():
        # Not where the memory of others, or none, lies beside it.
        assert _huge_kib() >= before + 12 * page_bytes() // 1024


def test_a_system_without_huge_pages_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "page_bytes", lambda: 0)
    Move([(4096, 1 << 30)]).go_on()


def _huge_kib() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def _can_collapse() -> bool:
    """MADV_COLLAPSE came with Linux 6.1."""
    version = Path("/proc/sys/kernel/osrelease").read_text().split(".")
    return (int(version[0]), int(version[1])) >= (6, 1)
