"""Child processes of a local cluster: started with the parent's fate, and started again when they die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from controlplane.runtime import die_with_parent
from controlplane.runtime.timing import Timings

LOG_TAIL_LINES = 5


class ChildFailed(RuntimeError):
    """A child died again and again; the text names it, its exit and the end of its log."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start one daemon."""

    name: str
    argv: tuple[str, ...]
    log_path: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class Child:
    """One daemon under supervision.

    It dies with us (parent-death signal), has a process group of its own, so that Ctrl-C at the terminal reaches only
    us and the order of stopping stays ours, and is started again with a doubling pause when it dies.
    """

    def __init__(self, spec: ChildSpec, timings: Timings, notice: Callable[[str], None], failures_max: int = 5) -> None:
        self.spec = spec
        self._timings = timings
        self._notice = notice
        self._failures_max = failures_max
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        with self.spec.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *die_with_parent.command(list(self.spec.argv), signal.SIGKILL),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.spec.environment},
                process_group=0,
            )

    async def supervise(self) -> None:
        """Start again whatever dies, until `stop`. Raises ChildFailed after `failures_max` failures in a window.

        What was killed from outside after it had lived for a while did not fail.
        """
        clock = asyncio.get_running_loop().time
        failures: deque[float] = deque()
        while not self._stopping:
            assert self._process is not None
            started = clock()
            code = await self._process.wait()
            if self._stopping:
                return
            if code >= 0 or clock() - started < self._timings.failure_timeout:
                failures.append(clock())
            while failures and clock() - failures[0] > self._timings.regroup_window:
                failures.popleft()
            if len(failures) >= self._failures_max:
                raise ChildFailed(self._last_words(code))
            self._notice(f"{self.spec.name} {describe_exit(code)}; starting it again")
            await asyncio.sleep(min(self._timings.failure_timeout, self._timings.reconnect_min * 2 ** len(failures)))
            await self.start()
            self._notice(f"{self.spec.name} is back, pid {self.pid}")

    async def stop(self, patience_s: float) -> None:
        """SIGTERM; SIGKILL what is still there after `patience_s` seconds."""
        self._stopping = True
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(patience_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """SIGKILL now, without waiting."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _last_words(self, code: int) -> str:
        lines = self.spec.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n  ".join(
            [f"{self.spec.name} {describe_exit(code)} {self._failures_max} times; {self.spec.log_path} ends:", *lines]
        )


def describe_exit(code: int) -> str:
    """ "was killed by SIGKILL" or "exited with code 1"."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
