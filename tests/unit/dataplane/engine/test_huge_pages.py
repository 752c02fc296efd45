"""Memory moves into huge pages as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dataplane.engine import huge_pages
from dataplane.engine.huge_pages import collapse, page_bytes


@pytest.mark.skipif(page_bytes() > 1 << 40, reason="a system without huge pages")
def test_memory_is_moved_bit_by_bit_and_stays_what_it_was() -> None:
    values = torch.arange(16 * page_bytes() // 4, dtype=torch.int32)
    kept = values.clone()
    collapse(values.data_ptr(), values.numel() * 4)
    assert torch.equal(values, kept)
    if _can_collapse():
        # Not where the memory of others, or none, lies beside it.
        assert _huge_kib(values.data_ptr()) >= 12 * page_bytes() // 1024


def test_a_system_without_huge_pages_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_SIZE_FILE", Path("/nowhere"))
    huge_pages.page_bytes.cache_clear()
    try:
        values = torch.arange(1 << 22, dtype=torch.int32)
        # All of it, where the system gives them unasked.
        before = _huge_kib(values.data_ptr())
        collapse(values.data_ptr(), values.numel() * 4)
        assert _huge_kib(values.data_ptr()) == before
    finally:
        huge_pages.page_bytes.cache_clear()


def _huge_kib(address: int) -> int:
    """Of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            inside = begin <= address < end
        elif inside and words[0] == "AnonHugePages:":
            return int(words[1])
    raise AssertionError(f"{address:#x} is not mapped")


def _can_collapse() -> bool:
    """MADV_COLLAPSE came with Linux 6.1."""
    version = Path("/proc/sys/kernel/osrelease").read_text().split(".")
    return (int(version[0]), int(version[1])) >= (6, 1)
