"""A daemon of the cluster under test: started again when it ends, as by a service manager, unless it is held down."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from controlplane.runtime import die_with_parent

RESTART_PAUSE_S = 0.1


class Daemon:
    """One process on one host. `start`, then `keep` for ever, then (with `keep` cancelled) `end`."""

    def __init__(self, name: str, command: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._command = list(command)
        self._log_path = log_path
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        # Whoever holds it down.
        self._holds = 0
        self._released = asyncio.Event()
        self._released.set()

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *die_with_parent.command(self._command, signal.SIGKILL),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
                process_group=0,
            )

    async def keep(self) -> None:
        """Eternal."""
        while True:
            assert self._process is not None
            await self._process.wait()
            await asyncio.sleep(RESTART_PAUSE_S)
            await self._released.wait()
            await self.start()

    def hold(self) -> None:
        """Once it ends it stays so, until each hold is released."""
        self._holds += 1
        self._released.clear()

    def release(self) -> None:
        self._holds -= 1
        if self._holds == 0:
            self._released.set()

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
