"""Huge pages for memory that every step reads from end to end.

In pages of 4 KiB a core walks page tables all the time, and its prefetchers stop at every page's end. The system gives
new memory larger ones where it is asked before the memory is written; a packed weight's memory is oneDNN's to take, so
it is moved afterwards (MADV_COLLAPSE, Linux 6.1), a little beside each step: nobody waits for it at a start.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from pathlib import Path

BYTES_A_STEP = 1 << 22
"""Takes one to four milliseconds."""

_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_COLLAPSE = 25


class Move:
    """Moves memory into huge pages, and what lies on the same pages beside it. Where the system has none to give, or no
    such call, all stays as it is."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """`ranges`: address and bytes, of memory that stays."""
        page = page_bytes()
        self._left = covering(ranges, page) if page else []

    def go_on(self) -> None:
        """Move the next `BYTES_A_STEP`, or what is left."""
        if not self._left:
            return
        begin, end = self._left.pop()
        stop = min(begin + max(BYTES_A_STEP, page_bytes()), end)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(stop - begin), _COLLAPSE)
        if stop < end:
            self._left.append((stop, end))


def covering(ranges: Iterable[tuple[int, int]], page: int) -> list[tuple[int, int]]:
    """(begin, end) of the pages that these ranges lie on, rising, none twice."""
    result: list[tuple[int, int]] = []
    for address, size in sorted(ranges):
        begin, end = address // page * page, -(-(address + size) // page) * page
        if result and begin <= result[-1][1]:
            begin = result.pop()[0]
        result.append((begin, end))
    return result


@cache
def page_bytes() -> int:
    """Size of a huge page; 0: there are none."""
    return int(_SIZE_FILE.read_text()) if _SIZE_FILE.exists() else 0
