"""A page of memory that a rank and its daemon share: the rank says that it moves, the daemon says that it must let go.

Eight little-endian u64 words, each written by one side only;
aligned 8-byte stores are atomic on the machines we run on.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

WORDS = 8
_PROGRESS, _ABORT, _COLLECTIVE, _STEP = range(4)


class ProgressPage:
    """The mapped page. `create` by the daemon, `open` by the rank."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._words = memoryview(mapped).cast("Q")

    @classmethod
    def create(cls, path: Path) -> ProgressPage:
        """A zeroed page in a new file at `path`."""
        path.write_bytes(bytes(WORDS * 8))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> ProgressPage:
        """Map the page at `path`. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(descriptor, WORDS * 8))
        finally:
            os.close(descriptor)

    @property
    def progress(self) -> int:
        """Moves per layer or collective while the rank works; also per loaded tensor and per compiled graph."""
        return self._words[_PROGRESS]

    def advance(self) -> None:
        """Rank: I moved."""
        self._words[_PROGRESS] += 1

    @property
    def abort_epoch(self) -> int:
        """Epochs up to this one are over: whoever waits in one of their collectives must leave it."""
        return self._words[_ABORT]

    def set_abort_epoch(self, epoch: int) -> None:
        """Daemon: end every epoch up to `epoch`."""
        self._words[_ABORT] = epoch

    @property
    def collective(self) -> int:
        """Collectives this rank entered in its epoch; the lowest in a group is the one that holds the others up."""
        return self._words[_COLLECTIVE]

    def set_collective(self, number: int) -> None:
        self._words[_COLLECTIVE] = number

    @property
    def step(self) -> int:
        """Number of the step under way; 0 between steps."""
        return self._words[_STEP]

    def set_step(self, number: int) -> None:
        self._words[_STEP] = number
