"""What may be done to a disk: nothing more fits, or what is written to it is safe only a while later."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from controlplane.runtime import die_with_parent

SLOW_CALLS = "fsync,fdatasync"
DETACH_S = 5.0


class DiskError(Exception):
    """It cannot be done here; the text says why."""


def fill(path: Path) -> None:
    """Take all the room that there is, down to the last byte."""
    with path.open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2


@asynccontextmanager
async def lagging(pid: int, milliseconds: int) -> AsyncIterator[None]:
    """Meanwhile a process waits so much longer whenever it has the disk make sure of what it wrote: a slow disk as the
    process sees it, also where the file system is memory. Raises DiskError."""
    strace = shutil.which("strace")
    if strace is None:
        raise DiskError("a disk that lags takes strace (package strace), which is not installed")
    tracing = await asyncio.create_subprocess_exec(
        *die_with_parent.command(
            [
                *(strace, "-f", "-p", str(pid), "-o", "/dev/null", "-e", f"trace={SLOW_CALLS}"),
                *("-e", f"inject={SLOW_CALLS}:delay_exit={milliseconds * 1000}"),
            ],
            signal.SIGTERM,
        ),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert tracing.stderr is not None
        said = (await tracing.stderr.readline()).decode(errors="replace").strip()
        if "attached" not in said:
            raise DiskError(f"strace: {said}")
        yield
    finally:
        # It lets the process go and ends; its own end alone would do that too.
        with suppress(ProcessLookupError):
            tracing.terminate()
        await asyncio.wait_for(tracing.wait(), DETACH_S)
