"""Huge pages for memory that every step reads from end to end.

In pages of 4 KiB a core walks page tables all the time, and its prefetchers stop at every page's end. The system gives
new memory larger ones where it is asked before the memory is written; a packed weight's memory is oneDNN's to take, so
it is moved afterwards (MADV_COLLAPSE, Linux 6.1).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_COLLAPSE = 25


def collapse(address: int, size: int) -> None:
    """Move memory into huge pages, and what lies on the same pages beside it. Where the system has none to give, or no
    such call, all stays as it is."""
    page = page_bytes()
    if size < page:
        return
    begin, end = address // page * page, -(-(address + size) // page) * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _COLLAPSE)


@cache
def page_bytes() -> int:
    """Size of a huge page; where there are none, more than any memory."""
    return int(_SIZE_FILE.read_text()) if _SIZE_FILE.exists() else 1 << 62
