"""The pool with a real zygote and real rank processes that start without torch."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from controlplane.runtime.clock import SystemClock
from controlplane.runtime.host import process_is_dead
from controlplane.runtime.ids import ClusterId, Epoch, NodeId
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.timing import derive_timings
from dataplane import frames
from dataplane.core.messages import Event, RankExited, RankForked, RankSaid
from dataplane.devices import lock_path
from dataplane.processes import dying_status, process_state
from dataplane.rank_pool import PoolSettings, RankPool
from dataplane.zygote import hold_device
from tests.support.cluster import READY_S, ROOT, eventually

CLUSTER = ClusterId("c")
NODE = NodeId("n")


class Watched:
    """A pool and what it reported."""

    def __init__(self, log_dir: Path) -> None:
        settings = PoolSettings(
            node=NODE,
            log_dir=log_dir,
            entry="tests.support.rank_process:rank_main",
            preload=(),
            environment={"PYTHONPATH": str(ROOT)},
        )
        self.events: list[Event] = []
        self.pool = RankPool(settings, CLUSTER, derive_timings(), SystemClock(), self.events.append)

    async def up(self, device: str = "cpu:0") -> int:
        """Spawn a rank; its pid, once it has said Hello."""
        seen = len(self.events)
        self.pool.spawn(device)

        def hello() -> int | None:
            said = (event for event in self.events[seen:] if isinstance(event, RankSaid))
            return next((event.pid for event in said if isinstance(event.frame, frames.Hello)), None)

        return await eventually(f"the rank of {device} is up", hello)

    async def exit_of(self, pid: int) -> RankExited:
        def gone() -> RankExited | None:
            exits = (event for event in self.events if isinstance(event, RankExited))
            return next((event for event in exits if event.pid == pid), None)

        return await eventually(f"the end of {pid} is reported", gone)


@pytest_asyncio.fixture
async def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setenv("PERDURE_RUNTIME_DIR", str(tmp_path / "run"))
    watched = Watched(tmp_path / "logs")
    await watched.pool.start()
    running = asyncio.create_task(watched.pool.run())
    yield watched
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    watched.pool.stop()


async def test_a_fork_is_reported_before_its_first_word(watched: Watched) -> None:
    pid = await watched.up()
    kinds = [type(event) for event in watched.events]
    assert kinds == [RankForked, RankSaid]
    assert watched.pool.pids == {"cpu:0": pid}


async def test_a_rank_that_leaves_in_order_exits_with_zero(watched: Watched) -> None:
    pid = await watched.up()
    watched.pool.send("cpu:0", frames.Exit())
    gone = await watched.exit_of(pid)
    assert (gone.exit_code, gone.exit_signal, gone.exonerates) == (0, None, False)


@pytest.mark.parametrize(
    ("number", "exonerates"), [(signal.SIGKILL, True), (signal.SIGSEGV, False), (signal.SIGTERM, False)]
)
async def test_only_a_kill_from_outside_exonerates(watched: Watched, number: signal.Signals, exonerates: bool) -> None:
    pid = await watched.up()
    os.kill(pid, number)
    gone = await watched.exit_of(pid)
    assert (gone.exit_signal, gone.exonerates) == (number, exonerates)
    assert number.name in gone.reason.text


async def test_a_kill_of_ours_carries_its_reason(watched: Watched) -> None:
    pid = await watched.up()
    reason = Reason(kind=ReasonKind.NO_PROGRESS, text="stuck")
    watched.pool.kill("cpu:0", pid, reason)
    gone = await watched.exit_of(pid)
    assert gone.reason == reason
    assert not gone.exonerates


async def test_a_held_device_ends_the_rank_with_the_reason(watched: Watched) -> None:
    descriptor = hold_device(str(lock_path(CLUSTER, NODE, "cpu:0")), 0)
    assert descriptor is not None
    try:
        watched.pool.spawn("cpu:0")
        forked = await eventually("it is forked", lambda: watched.pool.pids.get("cpu:0"))
        gone = await watched.exit_of(forked)
    finally:
        os.close(descriptor)
    assert gone.reason.kind is ReasonKind.NO_CAPACITY
    assert "held by another process" in gone.reason.text
    await watched.up()


async def test_a_dying_rank_keeps_its_successor_waiting_for_the_device(watched: Watched) -> None:
    first = await watched.up()
    os.kill(first, signal.SIGSTOP)
    watched.pool.spawn("cpu:0")
    second = await eventually("a second is forked", lambda: _other(watched.pool.pids.get("cpu:0"), first))
    os.kill(first, signal.SIGKILL)

    def second_is_up() -> bool:
        return any(isinstance(event, RankSaid) and event.pid == second for event in watched.events)

    await eventually("it has the device", second_is_up)


async def test_the_page_is_shared_both_ways(watched: Watched) -> None:
    await watched.up()
    before = watched.pool.samples()["cpu:0"]
    assert (before.progress, before.step) == (0, 0)
    assert before.process_state in ("S", "R")
    watched.pool.mark_epochs_over("cpu:0", Epoch(3))
    watched.pool.send("cpu:0", frames.Abort(Epoch(3)))
    await eventually("it answers", lambda: _said(watched, frames.Aborted))


async def test_a_zygote_that_dies_is_replaced_and_asked_again(watched: Watched) -> None:
    pid = await watched.up()
    zygote = watched.pool.zygote_pid
    assert zygote is not None
    os.kill(zygote, signal.SIGKILL)
    gone = await watched.exit_of(pid)
    assert gone.exonerates
    assert not process_is_dead(await watched.up())
    assert watched.pool.zygote_pid not in (None, zygote)


async def test_folders_of_dead_daemons_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_RUNTIME_DIR", str(tmp_path / "run"))
    child = await asyncio.create_subprocess_exec("true")
    await child.wait()
    left = tmp_path / "run" / "run" / f"n-{child.pid}"
    left.mkdir(parents=True)
    watched = Watched(tmp_path / "logs")
    await watched.pool.start()
    assert not left.exists()
    watched.pool.stop()


def test_the_status_of_a_dying_process_is_read_before_it_is_reaped() -> None:
    process = subprocess.Popen(["sh", "-c", "exit 7"])
    deadline = time.monotonic() + READY_S
    while process_state(process.pid) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    status = dying_status(process.pid)
    assert status is not None
    assert os.WEXITSTATUS(status) == 7
    process.wait()
    assert dying_status(process.pid) is None
    assert dying_status(os.getpid()) is None


def _other(pid: int | None, than: int) -> int | None:
    return pid if pid != than else None


def _said(watched: Watched, kind: type[frames.RankFrame]) -> bool:  # type: ignore[valid-type]
    return any(isinstance(event, RankSaid) and isinstance(event.frame, kind) for event in watched.events)
