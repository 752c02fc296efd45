"""The rank process: a blocking loop between its daemon, its device and its peers.

It outlives replicas: an epoch is prepared, formed, loaded, served and ended, and the weights stay for the next one if
they fit. Whatever goes wrong inside is told to the daemon with its reason; only the daemon's end, or Exit, ends the
process.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog
import torch

from controlplane.runtime.errors import PerdureError
from controlplane.runtime.ids import DeploymentId, Epoch
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaSpec
from controlplane.runtime.messages.weights import HeldWeights, WeightSource
from controlplane.runtime.telemetry import configure_logging
from dataplane.devices import CPU_RANKS
from dataplane.engine.engine import Engine
from dataplane.engine.follower import Follower
from dataplane.engine.holding import Held, Holding, Interrupted
from dataplane.engine.linear import pack
from dataplane.engine.link import DaemonGone, DaemonLink
from dataplane.engine.setup import agree, meet
from dataplane.engine.watch import AbortWatch
from dataplane.frames import (
    Abort,
    Aborted,
    Cancel,
    DaemonFrame,
    Exit,
    Failed,
    Form,
    Formed,
    GroupCosts,
    Hello,
    Holds,
    Load,
    Loaded,
    LoadProgress,
    Preload,
    Prepare,
    Prepared,
    Submit,
)
from dataplane.parallel.costs import CostLedger
from dataplane.parallel.mesh import Formation, Mesh, Rendezvous, form_mesh, plan_mesh
from dataplane.progress import ProgressPage

REPORT_INTERVAL_S = 0.02
"""Load reports leave at most so often (frames.py)."""

STEP_SHARE = 0.1
"""Longest predicted step as a share of the collective timeout: an eighth of the progress deadline (PROTOCOL §6)."""

READ_SHARE = 0.8
"""Reading weights as a share of the whole load; packing and measuring are the rest."""

_log = structlog.get_logger()


class Rank:
    """One device's engine and its conversation with the daemon."""

    def __init__(self, link: DaemonLink, name: str, device: torch.device, page: ProgressPage) -> None:
        """`name` is what the daemon calls the device."""
        self._link = link
        self._name = name
        self._device = device
        self._page = page
        self._prepared: Prepare | None = None
        self._rendezvous: Rendezvous | None = None
        self._mesh: Mesh | None = None
        self._holding = Holding(device, self._tell_held)
        # Frames that have come and were not obeyed yet.
        self._inbox: deque[DaemonFrame] = deque()
        self._serving: Engine | Follower | None = None
        self._watch: AbortWatch | None = None
        self._costs: CostLedger | None = None
        self._report_due = 0.0
        self._report_stale = False

    def run(self) -> None:
        """Until Exit. Raises DaemonGone."""
        self._link.send(Hello(os.getpid(), self._name))
        while True:
            self._inbox += self._link.receive(self._patience())
            while self._inbox:
                frame = self._inbox.popleft()
                if isinstance(frame, Exit):
                    return
                self._obey(frame)
            self._work()

    # ------------------------------------------------------------ the loop

    def _patience(self) -> float | None:
        """Seconds to wait for frames: none with work to do, else until the next report is due."""
        if self._serving is None:
            return None
        if isinstance(self._serving, Follower) or self._serving.has_work:
            return 0
        return max(self._report_due - time.monotonic(), 0) if self._report_stale else None

    def _work(self) -> None:
        engine = self._serving
        if isinstance(engine, Follower):
            # Until the driver's next plan, or the epoch's end: the watch on the abort word wakes it.
            self._attempt("step", lambda: engine.run(self._report_costs))
        elif engine is not None:
            if engine.has_work:
                self._attempt("step", lambda: self._step(engine))
            self._report()

    def _step(self, engine: Engine) -> None:
        done = engine.step(self._link.send)
        if done is not None:
            self._link.send(done)
            self._report_costs()
            self._report_stale = True

    def _report(self) -> None:
        if isinstance(self._serving, Engine) and self._report_stale and time.monotonic() >= self._report_due:
            self._link.send(self._serving.load_report())
            self._report_due = time.monotonic() + REPORT_INTERVAL_S
            self._report_stale = False

    def _report_costs(self) -> None:
        costs = self._costs.take(time.monotonic()) if self._costs is not None else ()
        if costs:
            self._link.send(GroupCosts(self._expect_prepared().epoch, costs))

    def _obey(self, frame: DaemonFrame) -> None:
        match frame:
            case Prepare():
                self._leave()
                self._prepared = frame
                self._attempt("prepare", self._prepare)
            case Form():
                self._in_epoch(frame.epoch, "form", lambda: self._form(frame))
            case Load():
                self._in_epoch(frame.epoch, "load", lambda: self._load(frame))
            case Preload():
                self._preload(frame)
            case Submit():
                if isinstance(self._serving, Engine):
                    self._serving.submit(frame.sequences)
                    self._report_stale = True
            case Cancel():
                if isinstance(self._serving, Engine):
                    self._serving.cancel(frame.sequences)
            case Abort():
                self._leave()
                self._link.send(Aborted(frame.epoch))
            case Exit():
                raise AssertionError("the loop ends at Exit")

    def _in_epoch(self, epoch: Epoch, during: str, action: Callable[[], None]) -> None:
        """Do it if `epoch` is ours; one that is over was answered already."""
        if self._prepared is not None and self._prepared.epoch == epoch:
            self._attempt(during, action)

    def _attempt(self, during: str, action: Callable[[], None]) -> None:
        """Supervision: any failure of `action` is told to the daemon, and the rank is idle again."""
        prepared = self._expect_prepared()
        epoch = prepared.epoch
        try:
            action()
        except DaemonGone:
            raise
        except Interrupted:
            # Its Abort is on the way.
            self._leave()
            _log.info("rank_interrupted", during=during, epoch=epoch)
        except Exception as error:  # noqa: BLE001 - the process and its weights must outlive any failure
            reason = replace(_reason(error, during), rank=prepared.rank)
            self._leave()
            self._link.send(Failed(epoch, during, reason))
            _log.exception("rank_failed", during=during, epoch=epoch)

    # ------------------------------------------------------------ an epoch's stages

    def _prepare(self) -> None:
        prepared = self._expect_prepared()
        self._use_device(cpu_threads(prepared))
        address = ""
        if len(prepared.members) > 1 and prepared.rank == 0:
            self._rendezvous = Rendezvous.listen(prepared.members[0].host)
            address = self._rendezvous.address
        self._link.send(Prepared(prepared.epoch, address, self._holding.fingerprint))

    def _form(self, form: Form) -> None:
        prepared = self._expect_prepared()
        if len(prepared.members) == 1:
            self._mesh = Mesh.single()
        else:
            deadline = time.monotonic() + form.deadline_ms / 1000
            rendezvous = self._rendezvous or Rendezvous.join(form.rendezvous, deadline)
            self._mesh = form_mesh(
                _formation(prepared, self._device), prepared.rank, self._device, rendezvous, deadline, self._page
            )
            self._watch = AbortWatch(self._mesh, self._page, prepared.epoch)
            self._costs = CostLedger(self._mesh)
        self._link.send(Formed(prepared.epoch))

    def _load(self, load: Load) -> None:
        prepared, mesh = self._expect_prepared(), self._mesh
        assert mesh is not None, "Load comes after Form"
        held = self._holding.hold(
            prepared.spec,
            mesh,
            _addresses(load.sources),
            lambda stage, share: self._progress(stage, READ_SHARE * share),
        )
        engine = self._engine(held, prepared)
        engine.reset(prepared.epoch)
        self._serving = engine
        self._report_stale = True
        self._holding.show(prepared.spec, prepared.members[prepared.rank].host)
        self._link.send(Loaded(prepared.epoch, engine.capacity, held.model.weights))

    def _engine(self, held: Held, prepared: Prepare) -> Engine | Follower:
        """What runs the weights. A new one where any rank of the mesh needs one, or two are not alike, as those of
        former replicas may be: they are set up together."""
        spec, mesh = prepared.spec, held.model.mesh
        engine = held.engine if _shape(held.spec) == _shape(spec) else None
        meet(mesh.control)
        go_on = agree(mesh.control, engine.settled if engine is not None else None)

        def report(stage: str, share: float) -> None:
            self._progress(stage, READ_SHARE + (1 - READ_SHARE) * share)

        if not go_on or self._device.type == "cuda":
            self._holding.hide()
        if engine is not None and go_on:
            engine.attach(held.model, report)
            return engine
        held.engine = engine = None
        if prepared.rank == 0:
            step_s = prepared.collective_timeout_ms / 1000 * STEP_SHARE
            held.engine = Engine(held.model, spec, self._device, self._page, step_s, report)
        else:
            held.engine = Follower(held.model, spec, self._device, self._page, report)
        held.spec = spec
        return held.engine

    def _progress(self, stage: str, fraction: float) -> None:
        """Raises Interrupted once the epoch is over: a load that outlasts its Abort ends in a kill."""
        epoch = self._expect_prepared().epoch
        if self._page.abort_epoch >= epoch:
            raise Interrupted
        self._page.advance()
        self._link.send(LoadProgress(epoch, stage, fraction))

    # ------------------------------------------------------------ ahead of need

    def _preload(self, frame: Preload) -> None:
        """Supervision as in an epoch: a failure is told, and the rank is idle again."""
        assert self._prepared is None, "weights are loaded ahead of need by a rank that is free"
        try:
            self._hold_ahead(frame)
        except DaemonGone:
            raise
        except Interrupted:
            _log.info("preload_interrupted", rank=frame.rank)
        except Exception as error:  # noqa: BLE001 - the process must outlive any failure
            self._link.send(Holds(None, _reason(error, "preload")))
            _log.exception("preload_failed", rank=frame.rank)

    def _hold_ahead(self, frame: Preload) -> None:
        """All that needs no peers: read the weights, and pack them on a CPU."""
        spec = frame.spec
        # Others compute on this host.
        self._use_device(spec.cpu_threads or 1)
        mesh = plan_mesh(replace(spec.degrees, data=1), frame.rank)
        held = self._holding.hold(spec, mesh, _addresses(frame.sources), lambda *_: self._look_up())
        if self._device.type == "cpu":
            pack(held.model.module, lambda _: self._look_up())
        self._holding.show(spec, frame.host)
        self._holding.warm(spec)

    def _use_device(self, threads: int) -> None:
        torch.set_num_threads(threads)
        if self._device.type == "cuda":
            # Kernels of our own go to the thread's device, wherever their tensors lie.
            torch.cuda.set_device(self._device)

    def _look_up(self) -> None:
        """Tell the daemon that this rank moves, and hear whether it wants something else. Raises Interrupted."""
        self._page.advance()
        if self._inbox or self._link.has_news():
            raise Interrupted

    def _tell_held(self, held: HeldWeights | None) -> None:
        self._link.send(Holds(held))

    # ------------------------------------------------------------ an epoch's end

    def _leave(self) -> None:
        """End the epoch: its sequences and its group go, process and weights stay."""
        if self._serving is not None:
            self._serving.leave()
        if self._watch is not None:
            self._watch.stop()
        if self._mesh is not None:
            self._mesh.abort()
            self._mesh.close()
        self._watch = self._costs = None
        self._serving = self._mesh = self._rendezvous = self._prepared = None
        self._report_stale = False

    def _expect_prepared(self) -> Prepare:
        assert self._prepared is not None, "the frame belongs to no epoch"
        return self._prepared


def rank_main(socket_path: str, device: str, page_path: str) -> None:
    """Serve the daemon that listens at `socket_path` until it says Exit or goes away. Entry of a forked rank."""
    configure_logging(json_lines=False, device=device)
    kind = device.partition(":")[0]
    chosen = torch.device("cpu") if kind == "cpu" else torch.device(device)
    link = DaemonLink(socket_path)
    try:
        Rank(link, device, chosen, ProgressPage.open(Path(page_path))).run()
    except DaemonGone as error:
        _log.info("daemon_gone", text=str(error))
    finally:
        link.close()


def cpu_threads(prepared: Prepare) -> int:
    """This rank's share of the cores: as much as every other rank on the host may take."""
    if prepared.spec.cpu_threads:
        return prepared.spec.cpu_threads
    node = prepared.members[prepared.rank].node
    ranks = sum(member.node == node for member in prepared.members)
    return max(len(os.sched_getaffinity(0)) // max(ranks, int(os.environ.get(CPU_RANKS, 0))), 1)


def _formation(prepared: Prepare, device: torch.device) -> Formation:
    backend = prepared.spec.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    return Formation(
        # The other replicas of a deployment are meshes of their own.
        degrees=replace(prepared.spec.degrees, data=1),
        hosts=tuple(member.host for member in prepared.members),
        nonce=prepared.nonce,
        epoch=prepared.epoch,
        backend=backend,
        collective_timeout_s=prepared.collective_timeout_ms / 1000,
    )


def _shape(spec: ReplicaSpec) -> ReplicaSpec:
    """What an engine was made for; whose it is does not matter."""
    return replace(spec, deployment=DeploymentId(""))


def _addresses(sources: tuple[WeightSource, ...]) -> tuple[str, ...]:
    return tuple(source.address for source in sources)


_FAILURES = {
    "prepare": ReasonKind.GROUP_FAILED,
    "form": ReasonKind.GROUP_FAILED,
    "load": ReasonKind.LOAD_FAILED,
    "preload": ReasonKind.LOAD_FAILED,
    "step": ReasonKind.ENGINE_FAULT,
}


def _reason(error: Exception, during: str) -> Reason:
    """Foreign exceptions get their kind here, once."""
    if isinstance(error, PerdureError):
        return error.reason
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return Reason(kind=ReasonKind.OUT_OF_MEMORY, text=text)
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in text:
        return Reason(kind=ReasonKind.DEVICE_SICK, text=text)
    return Reason(kind=_FAILURES[during], text=text)
