"""The daemon's end of its zygote: one is kept alive, asked to fork, and listened to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from controlplane.runtime.clock import Clock
from controlplane.runtime.timing import Timings
from dataplane import zygote
from dataplane.rank_log import rotate

log = structlog.get_logger()

DEATHS_MAX = 5
DEATHS_WINDOW_S = 60.0
"""A zygote that dies more often than this in the window ends the daemon."""


class ZygoteLost(Exception):
    """The zygote keeps dying: no rank can be made on this node."""


class ZygoteLink:
    """Keeps one zygote running. Messages from it go to `on_message`, its deaths to `on_death`."""

    def __init__(
        self,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        log_path: Path,
        timings: Timings,
        clock: Clock,
        on_message: Callable[[zygote.Message], None],
        on_death: Callable[[], None],
    ) -> None:
        """`arguments` are the zygote's entry and modules."""
        self._arguments = arguments
        # numpy's BLAS starts a thread per core at import, and a zygote must have one.
        self._environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment}
        self._log_path = log_path
        self._timings = timings
        self._clock = clock
        self._on_message = on_message
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._ready = False

    @property
    def pid(self) -> int | None:
        """None while there is no zygote."""
        return self._process.pid if self._process is not None else None

    @property
    def ready(self) -> bool:
        """True while the zygote has all imported and takes requests."""
        return self._ready

    async def run(self) -> None:
        """Eternal. Raises ZygoteLost once the zygote's deaths exceed the budget."""
        deaths: deque[float] = deque()
        while True:
            code = await self._run_one()
            log.error("zygote_exited", code=code, log=str(self._log_path))
            self._on_death()
            now = self._clock.now()
            deaths.append(now)
            while now - deaths[0] > DEATHS_WINDOW_S:
                deaths.popleft()
            if len(deaths) > DEATHS_MAX:
                raise ZygoteLost(f"the zygote died {len(deaths)} times in a row, see {self._log_path}")
            await self._clock.sleep(self._timings.reconnect_max)

    def ask(self, message: zygote.Fork) -> None:
        """For a zygote that is ready. If it is dead already, its death will be told."""
        assert self._control is not None, "ask only a zygote that is ready"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(zygote.encode(message))

    async def _run_one(self) -> int:
        """One zygote's life. Its exit code. Cancelled, it kills the zygote."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        rotate(self._log_path)
        try:
            self._process = await self._execute(theirs.fileno())
        finally:
            theirs.close()
        log.info("zygote_started", pid=self._process.pid)
        self._control = ours
        self._loop.add_reader(ours.fileno(), self._read)
        try:
            return await self._process.wait()
        finally:
            self._ready = False
            self._control = None
            self._loop.remove_reader(ours.fileno())
            ours.close()
            if self._process.returncode is None:
                self._process.kill()
            self._process = None

    async def _execute(self, descriptor: int) -> asyncio.subprocess.Process:
        with self._log_path.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "dataplane.zygote", str(descriptor), str(os.getpid()), *self._arguments),
                pass_fds=(descriptor,),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # A terminal's Ctrl-C is for the daemon, which ends its ranks in order.
                start_new_session=True,
                env=self._environment,
            )

    def _read(self) -> None:
        while self._control is not None:
            try:
                packet = self._control.recv(zygote.MESSAGE_BYTES_MAX)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                packet = b""
            if not packet:
                # Its end is closed: it is dead or dying, which its exit will tell.
                self._loop.remove_reader(self._control.fileno())
                return
            message = zygote.decode(packet)
            if isinstance(message, zygote.Ready):
                self._ready = True
            self._on_message(message)
