"""Rank processes: forked by the zygote, spoken to over a Unix socket, watched through pidfds and progress pages.

The pool decides nothing: it does what the core asks, and reports every process's start and end as an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from controlplane.runtime.clock import Clock
from controlplane.runtime.host import process_is_dead
from controlplane.runtime.ids import ClusterId, Epoch, NodeId
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.timing import Timings
from dataplane import frames, zygote
from dataplane.core.messages import Event, RankExited, RankForked, RankSaid, RankSample
from dataplane.devices import lock_path, runtime_dir
from dataplane.processes import dying_status, oom_kills, process_state
from dataplane.progress import ProgressPage
from dataplane.rank_link import RankLink
from dataplane.rank_log import rank_log, rotate
from dataplane.starvation import Starvation
from dataplane.zygote_link import ZygoteLink

log = structlog.get_logger()

RANK_ENTRY = "dataplane.rank:rank_main"
RANK_PRELOAD = ("torch", "transformers.modeling_utils")

EXIT_STATUS_WAIT_S = 0.1
"""How long news of a rank's end waits for its exit status; usually both come together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    node: NodeId
    log_dir: Path
    # `module:function`, called in each rank.
    entry: str = RANK_ENTRY
    # What the zygote imports beside the entry's module.
    preload: tuple[str, ...] = RANK_PRELOAD
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(slots=True)
class _Page:
    """A rank's progress page and the file it is shared through."""

    shared: ProgressPage
    path: Path


@dataclass(slots=True)
class _Process:
    device: str
    pid: int
    page: _Page
    oom_kills_before: int
    starvation: Starvation
    # Where its progress counter stood last.
    progress: int = 0
    starved_s: float = 0.0
    # None: it was gone before it could be watched.
    pidfd: int | None = None
    link: RankLink | None = None
    # As os.waitpid gave it to the zygote.
    status: int | None = None
    killed_for: Reason | None = None
    report: asyncio.TimerHandle | None = None


class RankPool:
    """All rank processes of a daemon. Every method is for its event loop."""

    def __init__(
        self,
        settings: PoolSettings,
        cluster: ClusterId,
        timings: Timings,
        clock: Clock,
        post: Callable[[Event], None],
    ) -> None:
        self._settings = settings
        self._cluster = cluster
        self._timings = timings
        self._clock = clock
        self._post = post
        self._loop = asyncio.get_running_loop()
        self._folder = runtime_dir() / "run" / f"{settings.node}-{os.getpid()}"
        self._zygote = ZygoteLink(
            (settings.entry, *settings.preload),
            settings.environment,
            settings.log_dir / "zygote.log",
            timings,
            clock,
            self._zygote_said,
            self._zygote_died,
        )
        self._processes: dict[int, _Process] = {}
        self._by_device: dict[str, _Process] = {}
        # Links whose process the zygote has not named yet, with what they said.
        self._early: dict[int, tuple[RankLink, list[frames.RankFrame]]] = {}
        # Devices to fork a rank for, and those that the zygote was asked for.
        self._wanted: dict[str, None] = {}
        self._asked: dict[str, _Page] = {}
        self._pages_made = 0
        self._server: asyncio.AbstractServer | None = None

    @property
    def zygote_pid(self) -> int | None:
        """None while there is no zygote."""
        return self._zygote.pid

    @property
    def pids(self) -> dict[str, int]:
        """The rank process of each device that has one."""
        return {process.device: process.pid for process in self._by_device.values()}

    async def start(self) -> None:
        """Open the ranks' socket. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_dead_folders(self._folder.parent)
        self._settings.log_dir.mkdir(parents=True, exist_ok=True)
        self._server = await self._loop.create_unix_server(lambda: RankLink(self), self._socket_path)

    async def run(self) -> None:
        """Keep a zygote alive. Raises ZygoteLost once its deaths exceed the budget."""
        await self._zygote.run()

    def stop(self) -> None:
        """Kill every rank and let go of the pool's files. The zygote ends with `run`."""
        for process in list(self._processes.values()):
            _kill(process)
            self._forget(process)
        if self._server is not None:
            self._server.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------ what the core asks

    def spawn(self, device: str) -> None:
        """Have a rank forked; waits for a zygote that is not ready."""
        self._wanted[device] = None
        self._ask_for_wanted()

    def send(self, device: str, frame: frames.DaemonFrame) -> None:
        """To the device's rank. One that is gone hears nothing; its end is reported."""
        process = self._by_device.get(device)
        if process is not None and process.link is not None:
            process.link.send(frame)

    def mark_epochs_over(self, device: str, epoch: Epoch) -> None:
        process = self._by_device.get(device)
        if process is not None:
            process.page.shared.set_abort_epoch(epoch)

    def kill(self, device: str, pid: int, reason: Reason) -> None:
        process = self._processes.get(pid)
        if process is not None and process.device == device:
            process.killed_for = reason
            _kill(process)

    def samples(self) -> dict[str, RankSample]:
        """What all ranks look like from outside, now."""
        return {process.device: self._sample(process) for process in self._by_device.values()}

    def _sample(self, process: _Process) -> RankSample:
        page = process.page.shared
        if page.step and page.progress == process.progress:
            process.starved_s += process.starvation.look(self._clock.now())
        else:
            process.starvation.forget()
        process.progress = page.progress
        return RankSample(
            progress=process.progress,
            collective=page.collective,
            step=page.step,
            process_state=process_state(process.pid),
            starved_s=process.starved_s,
        )

    # ------------------------------------------------------------ the zygote

    @property
    def _socket_path(self) -> str:
        return str(self._folder / "ranks.sock")

    def _ask_for_wanted(self) -> None:
        while self._zygote.ready and self._wanted:
            device = next(iter(self._wanted))
            del self._wanted[device]
            page = self._new_page(device)
            self._asked[device] = page
            log_path = rank_log(self._settings.log_dir, device)
            rotate(log_path)
            self._zygote.ask(
                zygote.Fork(
                    device=device,
                    socket_path=self._socket_path,
                    page_path=str(page.path),
                    lock_path=str(lock_path(self._cluster, self._settings.node, device)),
                    log_path=str(log_path),
                    lock_wait_ms=round(self._timings.failure_timeout * 1000),
                )
            )

    def _new_page(self, device: str) -> _Page:
        self._pages_made += 1
        path = self._folder / f"{device.replace(':', '-')}-{self._pages_made}.page"
        return _Page(ProgressPage.create(path), path)

    def _zygote_said(self, message: zygote.Message) -> None:
        match message:
            case zygote.Ready():
                self._ask_for_wanted()
            case zygote.Forked():
                self._forked(message)
            case zygote.ForkFailed():
                self._asked.pop(message.device).path.unlink()
                reason = Reason(kind=ReasonKind.PROCESS_EXITED, text=message.text, node=self._settings.node)
                self._post(RankExited(message.device, 0, reason))
            case zygote.Exited():
                process = self._processes.get(message.pid)
                if process is not None:
                    process.status = message.status
                    self._gone(process)
            case _:
                raise AssertionError(f"a zygote does not send {message}")

    def _zygote_died(self) -> None:
        """Its ranks die with it, each reported; what it was asked for is asked of the next one."""
        for device, page in self._asked.items():
            page.path.unlink(missing_ok=True)
            self._wanted[device] = None
        self._asked.clear()

    def _forked(self, message: zygote.Forked) -> None:
        page = self._asked.pop(message.device)
        process = _Process(message.device, message.pid, page, oom_kills(), Starvation(message.pid))
        self._processes[message.pid] = self._by_device[message.device] = process
        # The id is the zygote's child's until the zygote's next message says that it was reaped.
        with contextlib.suppress(ProcessLookupError):
            process.pidfd = os.pidfd_open(message.pid)
            self._loop.add_reader(process.pidfd, self._gone, process)
        self._post(RankForked(message.device, message.pid))
        early = self._early.pop(message.pid, None)
        if early is not None:
            process.link, said = early
            for frame in said:
                self._post(RankSaid(process.device, process.pid, frame))

    # ------------------------------------------------------------ links

    def link_said(self, link: RankLink, frame: frames.RankFrame) -> None:
        process = self._processes.get(link.pid)
        if process is None:
            self._early.setdefault(link.pid, (link, []))[1].append(frame)
            return
        process.link = link
        self._post(RankSaid(process.device, process.pid, frame))

    def link_lost(self, link: RankLink) -> None:
        self._early.pop(link.pid, None)
        process = self._processes.get(link.pid)
        if process is not None:
            self._gone(process)

    def link_broke_protocol(self, link: RankLink, text: str) -> None:
        process = self._processes.get(link.pid)
        if process is not None:
            log.error("rank_frame_refused", device=process.device, pid=process.pid, error=text)
            self.kill(process.device, process.pid, Reason(kind=ReasonKind.GROUP_FAILED, text=text))

    # ------------------------------------------------------------ ends

    def _gone(self, process: _Process) -> None:
        """First news of a rank's end: its closed socket, its pidfd, or the zygote's wait. Reported once, with the exit
        status if that can be had soon."""
        if self._processes.get(process.pid) is not process:
            return
        if process.pidfd is not None:
            self._loop.remove_reader(process.pidfd)
        if process.status is None:
            process.status = dying_status(process.pid)
        if process.status is not None:
            self._report(process)
        elif process.report is None:
            process.report = self._loop.call_later(EXIT_STATUS_WAIT_S, self._report, process)

    def _report(self, process: _Process) -> None:
        if self._processes.get(process.pid) is not process:
            return
        # A rank that only closed its socket is of no use either.
        _kill(process)
        self._forget(process)
        self._post(self._exit_event(process))

    def _exit_event(self, process: _Process) -> RankExited:
        status = process.status
        code = os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None
        number = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
        orphaned = status is None and not self._zygote.ready
        from_outside = number == signal.SIGKILL and process.killed_for is None
        return RankExited(
            device=process.device,
            pid=process.pid,
            reason=process.killed_for or self._reason(process, code, number, orphaned),
            exit_code=code,
            exit_signal=number,
            exonerates=orphaned or (from_outside and oom_kills() == process.oom_kills_before),
        )

    def _reason(self, process: _Process, code: int | None, number: int | None, orphaned: bool) -> Reason:
        if code == zygote.EXIT_DEVICE_BUSY:
            text = f"{process.device} is held by another process"
            return Reason(kind=ReasonKind.NO_CAPACITY, text=text, node=self._settings.node)
        if number is not None:
            how = f"ended by {_signal_name(number)}"
        elif code is not None:
            how = f"exited with code {code}"
        else:
            how = "ended with its zygote" if orphaned else "closed its socket"
        text = f"rank process {process.pid} on {process.device} {how}"
        return Reason(kind=ReasonKind.PROCESS_EXITED, text=text, node=self._settings.node)

    def _forget(self, process: _Process) -> None:
        del self._processes[process.pid]
        if self._by_device.get(process.device) is process:
            del self._by_device[process.device]
        if process.report is not None:
            process.report.cancel()
        if process.pidfd is not None:
            self._loop.remove_reader(process.pidfd)
            os.close(process.pidfd)
        if process.link is not None:
            process.link.close()
        process.page.path.unlink(missing_ok=True)


def _kill(process: _Process) -> None:
    """Through the pidfd, so that nobody else can be hit."""
    if process.pidfd is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _remove_dead_folders(parent: Path) -> None:
    """Runtime folders whose daemon was killed."""
    for folder in parent.iterdir():
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and process_is_dead(int(pid)) and int(pid) != os.getpid():
            shutil.rmtree(folder, ignore_errors=True)
