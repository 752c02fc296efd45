"""Exchange of small tensors between ranks of one host, through a shared page: 7–11 µs where gloo takes 400–590.

The board holds one flag and two slots a rank. Exchange s of a group, on every rank:
  1. wait until all flags are at least s - 1;
  2. copy the own tensor into the own slot s mod 2, then set the own flag to s;
  3. wait until the flags of those whose slots it reads are at least s, and read them.

Why no reader sees a torn slot. A rank writes slot s mod 2 again at exchange s + 2, after it saw every flag at s + 1 or
more; a rank sets its flag to s + 1 only after it has read what it wanted of exchange s. Why a flag tells the truth
about its slot: each flag is one aligned 8-byte store by one writer, and x86 makes a processor's stores visible in the
order they were made and its loads in the order they are made (Intel SDM vol. 3, 9.2.2), so who reads flag s reads the
slot's bytes of s or later; the copies are too small for non-temporal stores. Other machines use gloo.

Layout: `ranks` flags 64 bytes apart, so that no two share a cache line; then slots by parity, then rank.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

SLOT_BYTES = 64 * 1024
FLAG_STRIDE_BYTES = 64
FOLDER = Path("/dev/shm")

_SPINS = 200
_YIELD_S = 0.002
_SLEEP_S_MIN, _SLEEP_S_MAX = 50e-6, 500e-6
_LATE_S = 0.1
"""Between two looks lie half a millisecond and what others take of the processor. Past this, who waits did not run
itself."""


class BoardAborted(Exception):
    """The wait was ended: the epoch is over."""


class BoardTimeout(Exception):
    """A peer did not come in time. `missing` are its indices in the group."""

    def __init__(self, missing: list[int]) -> None:
        super().__init__(f"waited for {missing}")
        self.missing = missing


def is_supported() -> bool:
    """Whether this machine orders its stores as the protocol needs, and has shared memory."""
    return platform.machine() in ("x86_64", "AMD64") and FOLDER.is_dir()


class Board:
    """One rank's view of a group's board."""

    def __init__(self, path: Path, ranks: int, index: int) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(descriptor, board_bytes(ranks))
        finally:
            os.close(descriptor)
        self._flags = memoryview(self._memory).cast("Q")
        data = torch.frombuffer(self._memory, dtype=torch.uint8, offset=ranks * FLAG_STRIDE_BYTES)
        self._slots = data.view(2, ranks, SLOT_BYTES)
        self._ranks = range(ranks)
        self._index = index
        self._step = FLAG_STRIDE_BYTES // 8
        self._number = 0
        self._aborted = False

    def abort(self) -> None:
        """End every wait, now and later. From any thread."""
        self._aborted = True

    def gather(self, x: Tensor, deadline: float | None) -> Tensor:
        """All ranks' `x`, (ranks, *x.shape), as a view that is good until this rank's next exchange."""
        self._put(x, deadline)
        self._wait(self._ranks, self._number, deadline)
        return self._view(x)

    def broadcast(self, x: Tensor, source: int, deadline: float | None) -> None:
        """Copy `x` of `source` into everybody's `x`. The source does not wait for the others to read it."""
        if self._index == source:
            self._put(x, deadline)
            return
        self._wait((source,), self._number + 1, deadline)
        self._number += 1
        x.copy_(self._view(x)[source])
        self._flags[self._index * self._step] = self._number

    def _put(self, x: Tensor, deadline: float | None) -> None:
        self._wait(self._ranks, self._number, deadline)
        self._number += 1
        self._view(x)[self._index].copy_(x)
        self._flags[self._index * self._step] = self._number

    def _view(self, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        slots = self._slots[self._number % 2, :, :size]
        return slots.view(x.dtype).view(len(self._ranks), *x.shape) if x.shape else slots.view(x.dtype).view(-1)

    def _wait(self, ranks: Sequence[int], number: int, deadline: float | None) -> None:
        flags, step = self._flags, self._step
        for rank in ranks:
            place = rank * step
            if flags[place] < number:
                self._wait_long(lambda place=place: flags[place] >= number, ranks, number, deadline)

    def _wait_long(self, ready: Callable[[], bool], ranks: Sequence[int], number: int, deadline: float | None) -> None:
        """Spin, then let others run, then sleep: an idle rank must not hold a core."""
        for _ in range(_SPINS):
            if ready():
                return
        seen = time.monotonic()
        yield_until = seen + _YIELD_S
        sleep = _SLEEP_S_MIN
        while not ready():
            if self._aborted:
                raise BoardAborted
            now = time.monotonic()
            if deadline is not None and now - seen > _LATE_S:
                # Its peers may not have run either: a paused machine's.
                deadline += now - seen
            seen = now
            if deadline is not None and now >= deadline:
                raise BoardTimeout([rank for rank in ranks if self._flags[rank * self._step] < number])
            if now < yield_until:
                os.sched_yield()
            else:
                time.sleep(sleep)
                sleep = min(sleep * 2, _SLEEP_S_MAX)


def board_bytes(ranks: int) -> int:
    """Size of a board's file."""
    return ranks * (FLAG_STRIDE_BYTES + 2 * SLOT_BYTES)


def create_board(path: Path, ranks: int) -> None:
    """A zeroed board at `path`. To be unlinked once every rank has mapped it."""
    with path.open("xb") as file:
        file.truncate(board_bytes(ranks))


def fits(x: Tensor) -> bool:
    """Whether `x` goes through a board."""
    return x.device.type == "cpu" and x.is_contiguous() and x.numel() * x.element_size() <= SLOT_BYTES
