"""Asks the system for a model's files ahead of need: another shard of it then loads from memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import structlog

STEP_BYTES = 64 * 1024 * 1024

_log = structlog.get_logger()


class Warmer:
    """A thread that lets the page cache read files, in order, until all are asked for or it is stopped.

    It copies nothing, and what it brings in is the first that the system gives up.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="warmer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def join(self) -> None:
        """Return once it is done."""
        self._thread.join()

    def _run(self) -> None:
        try:
            for path in self._files:
                self._warm(path)
        except OSError as error:
            _log.info("page_cache_not_warmed", error=str(error))

    def _warm(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start in range(0, os.fstat(descriptor).st_size, STEP_BYTES):
                if self._stopped.is_set():
                    return
                os.posix_fadvise(descriptor, start, STEP_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
