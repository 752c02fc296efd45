"""One `perdure up` or `perdure serve`, from its lock to its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from controlplane.runtime.errors import PerdureError
from controlplane.runtime.telemetry import configure_logging
from tools.up.banner import banner
from tools.up.checks import CheckFailed
from tools.up.cluster import LocalCluster
from tools.up.desired import DeploymentRefused
from tools.up.display import Display, display_for_stdout
from tools.up.options import UpRefused
from tools.up.plan import ClusterPlan
from tools.up.prepare import ModelMissing
from tools.up.process import ChildFailed
from tools.up.readiness import ModelRefused
from tools.up.state import RunningCluster, StateDir, StateError, check_writable, write_json

T = TypeVar("T")

REFUSALS = (StateError, CheckFailed, ModelMissing, ModelRefused, DeploymentRefused, ChildFailed, PerdureError)

Planner = Callable[[StateDir, Display], Coroutine[None, None, ClusterPlan]]
"""Checks everything and prepares the model; starts nothing."""


async def run_cluster(planner: Planner, state_dir: Path, ready_file: Path | None) -> None:
    """Check, prepare, start, serve until a signal, stop. Raises ConfigError or UpRefused."""
    # What we do is shown as lines and bars; the daemons' own logs are in the state folder.
    configure_logging(json_lines=False, level="error")
    state = StateDir(state_dir)
    display = display_for_stdout()
    stop = Stop()
    try:
        if ready_file is not None:
            check_writable(ready_file)
        with state.locked():
            plan = await stop.or_outcome(planner(state, display))
            if plan is not None:
                await _serve(plan, state, ready_file, display, stop)
    except REFUSALS as error:
        raise UpRefused(str(error)) from error
    finally:
        display.close()


class Stop:
    """The wish to stop: the first SIGINT, SIGTERM or SIGHUP asks, a second one insists."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled)

    async def or_outcome(self, work: Coroutine[None, None, T]) -> T | None:
        """The outcome of `work`, or None if asked to stop before it is done."""
        task, asked = asyncio.create_task(work), asyncio.create_task(self.asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            asked.cancel()
            await asyncio.wait({task, asked})

    def _signalled(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()


async def _serve(plan: ClusterPlan, state: StateDir, ready_file: Path | None, display: Display, stop: Stop) -> None:
    """Start, say where it serves, watch until asked to stop, stop in order."""

    def notice(text: str) -> None:
        display.line(f"{datetime.now().astimezone():%H:%M:%S} {text}")
        state.write_running(cluster.running(os.getpid()))

    cluster = LocalCluster(plan, state, notice)
    try:
        started = await stop.or_outcome(_until_ready(cluster, state, display))
        if started is None:
            return
        display.close()
        display.line(banner(started, state.path))
        if ready_file is not None:
            write_json(ready_file, started)
        await stop.or_outcome(cluster.until_failure())
    finally:
        display.close()
        await _stop_in_order(cluster, display, stop)


async def _until_ready(cluster: LocalCluster, state: StateDir, display: Display) -> RunningCluster:
    display.bar("cluster", 0, "starting")
    await cluster.start()
    state.write_running(cluster.running(os.getpid()))
    await cluster.until_ready(display)
    running = cluster.running(os.getpid())
    state.write_running(running)
    return running


async def _stop_in_order(cluster: LocalCluster, display: Display, stop: Stop) -> None:
    """Asked twice, the daemons are killed where they stand."""
    display.line("Stopping workers, control planes, etcd …")
    insist = asyncio.create_task(stop.insisted.wait())
    insist.add_done_callback(lambda task: None if task.cancelled() else cluster.kill())
    try:
        await cluster.stop()
    finally:
        insist.cancel()
    display.line("Stopped.")
