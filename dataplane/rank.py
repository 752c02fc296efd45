"""The rank process: a blocking loop between its daemon, its device and its peers.

It outlives replicas: an epoch is prepared, formed, loaded, served and ended, and the weights stay for the next one if
they fit. Whatever goes wrong inside is told to the daemon with its reason; only the daemon's end, or Exit, ends the
process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch

from controlplane.runtime.errors import PerdureError
from controlplane.runtime.ids import DeploymentId, Epoch
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaSpec
from controlplane.runtime.telemetry import configure_logging
from dataplane.engine.engine import Engine
from dataplane.engine.follower import Follower
from dataplane.engine.link import DaemonGone, DaemonLink
from dataplane.engine.setup import meet
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
    Load,
    Loaded,
    LoadProgress,
    Prepare,
    Prepared,
    Submit,
)
from dataplane.models.fit import FittedModel, fingerprint, load_model
from dataplane.parallel.collectives import all_gather_data
from dataplane.parallel.costs import CostLedger
from dataplane.parallel.mesh import Formation, Mesh, Rendezvous, form_mesh
from dataplane.progress import ProgressPage

REPORT_INTERVAL_S = 0.02
"""Load reports leave at most so often (frames.py)."""

STEP_SHARE = 0.1
"""Longest predicted step as a share of the collective timeout: an eighth of the progress deadline (PROTOCOL §6)."""

READ_SHARE = 0.8
"""Reading weights as a share of the whole load; packing and measuring are the rest."""

_log = structlog.get_logger()


@dataclass(slots=True)
class Held:
    """Weights on the device, and what runs them while its spec lasts."""

    model: FittedModel
    spec: ReplicaSpec
    engine: Engine | Follower | None = None


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
        self._held: Held | None = None
        self._serving: Engine | Follower | None = None
        self._watch: AbortWatch | None = None
        self._costs: CostLedger | None = None
        self._report_due = 0.0
        self._report_stale = False

    def run(self) -> None:
        """Until Exit. Raises DaemonGone."""
        self._link.send(Hello(os.getpid(), self._name))
        while True:
            for frame in self._link.receive(self._patience()):
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
                self._in_epoch(frame.epoch, "load", self._load)
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
        except Exception as error:  # noqa: BLE001 - the process and its weights must outlive any failure
            reason = replace(_reason(error, during), rank=prepared.rank)
            self._leave()
            self._link.send(Failed(epoch, during, reason))
            _log.exception("rank_failed", during=during, epoch=epoch)

    # ------------------------------------------------------------ an epoch's stages

    def _prepare(self) -> None:
        prepared = self._expect_prepared()
        torch.set_num_threads(_threads(prepared))
        address = ""
        if len(prepared.members) > 1 and prepared.rank == 0:
            self._rendezvous = Rendezvous.listen(prepared.members[0].host)
            address = self._rendezvous.address
        self._link.send(Prepared(prepared.epoch, address, self._held.model.weights if self._held else ""))

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

    def _load(self) -> None:
        prepared, mesh = self._expect_prepared(), self._mesh
        assert mesh is not None, "Load comes after Form"
        held = self._hold(prepared.spec, mesh)
        engine = self._engine(held, prepared)
        engine.reset(prepared.epoch)
        self._serving = engine
        self._report_stale = True
        self._link.send(Loaded(prepared.epoch, engine.capacity, held.model.weights))

    def _hold(self, spec: ReplicaSpec, mesh: Mesh) -> Held:
        """The weights for `spec`: those that are here, if they fit."""
        held = self._held
        if held is not None and held.model.weights == fingerprint(spec, mesh):
            held.model = held.model.attach(mesh)
            return held
        # The old ones go first: two models do not fit on one device.
        self._held = held = None
        model = load_model(spec, mesh, self._device, lambda stage, share: self._progress(stage, READ_SHARE * share))
        self._held = Held(model, spec)
        return self._held

    def _engine(self, held: Held, prepared: Prepare) -> Engine | Follower:
        """What runs the weights. A new one where any rank of the mesh needs one: they are set up together."""
        spec, mesh = prepared.spec, held.model.mesh
        engine = held.engine if _shape(held.spec) == _shape(spec) else None
        meet(mesh.control)
        everywhere = all(all_gather_data(mesh.control, engine is not None))
        if engine is not None and everywhere:
            engine.attach(held.model)
            return engine
        held.engine = engine = None

        def report(stage: str, share: float) -> None:
            self._progress(stage, READ_SHARE + (1 - READ_SHARE) * share)

        if prepared.rank == 0:
            step_s = prepared.collective_timeout_ms / 1000 * STEP_SHARE
            held.engine = Engine(held.model, spec, self._device, self._page, step_s, report)
        else:
            held.engine = Follower(held.model, spec, self._device, self._page, report)
        held.spec = spec
        return held.engine

    def _progress(self, stage: str, fraction: float) -> None:
        self._page.advance()
        self._link.send(LoadProgress(self._expect_prepared().epoch, stage, fraction))

    def _leave(self) -> None:
        """End the epoch: its sequences and its group go, process and weights stay."""
        if self._serving is not None:
            self._serving.reset(Epoch(0))
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


def _threads(prepared: Prepare) -> int:
    """This rank's share of the cores."""
    if prepared.spec.cpu_threads:
        return prepared.spec.cpu_threads
    node = prepared.members[prepared.rank].node
    ranks = sum(member.node == node for member in prepared.members)
    return max(len(os.sched_getaffinity(0)) // ranks, 1)


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


_FAILURES = {
    "prepare": ReasonKind.GROUP_FAILED,
    "form": ReasonKind.GROUP_FAILED,
    "load": ReasonKind.LOAD_FAILED,
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
