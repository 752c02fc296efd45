"""Modelled rank processes: what a daemon hears of them, their groups, and all that can go wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from controlplane.runtime.ids import Epoch, ReplicaId
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaSpec
from controlplane.runtime.messages.weights import HeldWeights
from dataplane import frames
from dataplane.core.messages import RankSample
from tools.sim.engine import SimEngine
from tools.sim.kernel import Kernel
from tools.sim.process import Process

PIPE_S = 0.0001
STEP_S = (0.01, 0.03)
FORM_S = 0.01
LOAD_STAGE_S = (0.02, 0.15)
LOAD_STAGES = 4
REPORT_S = 0.02
STUCK_S = 0.05
"""How often a rank in a collective looks whether its peers are there."""
ATTACHED_S = 0.01

Said = Callable[["SimRank", frames.RankFrame], None]
Gone = Callable[["SimRank", int | None, int | None], None]


class Mesh:
    """The process group of one replica epoch."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ranks: dict[int, SimRank] = {}
        self.loaded: set[int] = set()

    @property
    def whole(self) -> bool:
        return len(self.ranks) == self.size

    @property
    def broken(self) -> bool:
        """A member's process is gone or left: collectives fail."""
        return any(not rank.alive or rank.mesh is not self for rank in self.ranks.values())

    @property
    def moves(self) -> bool:
        return all(rank.runs and not rank.stuck for rank in self.ranks.values())


class RankHouse:
    """All rank processes of the world, who holds which device, and their groups."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.forks_fail = False
        self._pids = 1000
        self._locks: dict[tuple[str, str], SimRank] = {}
        self._meshes: dict[tuple[ReplicaId, Epoch, str], Mesh] = {}
        self.all: list[SimRank] = []

    def fork(self, daemon: Process, device: str, said: Said, gone: Gone) -> SimRank:
        self._pids += 1
        rank = SimRank(self, daemon, device, self._pids, said, gone)
        self.all = [other for other in self.all if other.alive]
        self.all.append(rank)
        rank.later(0.02, rank.start)
        return rank

    def lock(self, rank: SimRank) -> bool:
        """Take the device, if no process holds it."""
        key = (rank.host, rank.device)
        holder = self._locks.get(key)
        if holder is not None and holder.holds_device:
            return holder is rank
        self._locks[key] = rank
        return True

    def mesh(self, prepared: frames.Prepare) -> Mesh:
        key = (prepared.replica, prepared.epoch, prepared.nonce)
        return self._meshes.setdefault(key, Mesh(len(prepared.members)))

    def holds(self, host: str, device: str, spec: ReplicaSpec, rank: int) -> bool:
        """The living rank process of the device has that shard."""
        weights = _weights(spec, rank)
        return any(
            one.alive and (one.host, one.device) == (host, device) and one.weights == weights for one in self.all
        )

    def hung(self, replica: ReplicaId, epoch: Epoch, since: float) -> bool:
        """A rank of the epoch was stuck, stopped or dead after `since`, or not all of them met."""
        meshes = [mesh for (name, number, _), mesh in self._meshes.items() if (name, number) == (replica, epoch)]
        return any(
            not mesh.whole or mesh.broken or any(rank.hung_until >= since for rank in mesh.ranks.values())
            for mesh in meshes
        )

    def of_daemon(self, daemon: Process) -> list[SimRank]:
        return [rank for rank in self.all if rank.daemon is daemon and rank.alive]


class SimRank(Process):
    """One rank process. Its daemon is told of frames and of its end after a moment, in order."""

    def __init__(self, house: RankHouse, daemon: Process, device: str, pid: int, said: Said, gone: Gone) -> None:
        super().__init__(house.kernel, f"{daemon.name}/{device}", daemon.host)
        self.device = device
        self.pid = pid
        self.daemon = daemon
        self.holds_device = False
        # Hangs in a kernel or a lock: alive, and moving nothing.
        self.stuck = False
        # It was stuck or stopped, by no machine's fault, until then; infinite while it is.
        self.hung_until = -inf
        # Times a step is slower than it should be.
        self.slow = 1.0
        # Seconds that its daemon waits longer for all it says.
        self.late = 0.0
        self.progress = 0
        self.collective = 0
        self.step = 0
        self.mesh: Mesh | None = None
        self.engine: SimEngine | None = None
        self._house = house
        self._said = said
        self._gone = gone
        self._prepared: frames.Prepare | None = None
        self._preloading: frames.Preload | None = None
        # Of the shard that it holds.
        self.weights = ""
        self._over = Epoch(0)
        self._stepping = False
        self._lock_tries = 0
        self._report_due = False
        self._heard_by = 0.0
        # Its last step's outcome.
        self._done: frames.StepDone | None = None

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Take the device, then greet; a device that stays busy ends the process."""
        if not self._house.lock(self):
            self._lock_tries += 1
            if self._lock_tries > 30:
                self.die(code=75)
            else:
                self.later(0.1, self.start)
            return
        self.holds_device = True
        self.say(frames.Hello(self.pid, self.device))

    def die(self, *, code: int | None = None, signal: int | None = None, release_after: float = 0.0) -> None:
        """Its end; a killed one may hold its device for a while."""
        if not self.alive:
            return
        self.kill()
        self.mesh = self.engine = None
        self.kernel.after(release_after, self._release)
        self.kernel.after(max(release_after, 0.002), self.daemon.run, self._gone, self, code, signal)

    def _release(self) -> None:
        self.holds_device = False

    def hangs(self) -> None:
        self.hung_until = inf

    def hangs_no_more(self) -> None:
        self.hung_until = self.kernel.now

    def say(self, frame: frames.RankFrame) -> None:
        self._heard_by = max(self._heard_by, self.kernel.now + PIPE_S + self.late)
        self.kernel.at(self._heard_by, self.daemon.run, self._said, self, frame)

    def lie(self) -> str:
        """Answer what nobody asked, or again, for the present epoch or the one before. The frame's name."""
        kind = self.kernel.random.choice(("formed", "loaded", "failed", "aborted", "greets", "done"))
        epoch = self.epoch if self.kernel.random.random() < 0.5 else Epoch(max(0, self.epoch - 1))
        match kind:
            case "formed":
                self.say(frames.Formed(epoch))
            case "loaded":
                if self._prepared is not None:
                    self.say(frames.Loaded(epoch, SimEngine(self._prepared.spec, epoch).capacity, self.weights))
            case "failed":
                self.say(frames.Failed(Epoch(max(0, self.epoch - 1)), "step", Reason(kind=ReasonKind.GROUP_FAILED)))
            case "aborted":
                self.say(frames.Aborted(epoch))
            case "greets":
                self.say(frames.Hello(self.pid, self.device))
            case _:
                if self._done is not None:
                    self.say(self._done)
        return kind

    def hear(self, frame: frames.DaemonFrame) -> None:
        self.kernel.after(PIPE_S, self.run, self._obey, frame)

    @property
    def epoch(self) -> Epoch:
        """The epoch it belongs to; 0: none."""
        return self._prepared.epoch if self._prepared is not None else Epoch(0)

    def sample(self) -> RankSample:
        return RankSample(self.progress, self.collective, self.step, "T" if self.stopped else "S")

    def mark_over(self, epoch: Epoch) -> None:
        """The abort word: a rank that waits in a collective of the epoch leaves it."""
        self._over = max(self._over, epoch)
        self.run(self._heed)

    def _heed(self) -> None:
        prepared = self._prepared
        if prepared is not None and prepared.epoch <= self._over and self._stepping and not self.stuck:
            self._fail("step", "the group was aborted")

    # ------------------------------------------------------------ frames

    def _obey(self, frame: frames.DaemonFrame) -> None:
        if self.stuck:
            self.later(STUCK_S, self._obey, frame)
            return
        match frame:
            case frames.Prepare():
                self._leave()
                self._prepared = frame
                self.kernel.tell(self.name, "rank_prepared", replica=frame.replica, epoch=frame.epoch)
                rendezvous = f"{self.host}:29500" if frame.rank == 0 and len(frame.members) > 1 else ""
                self.say(frames.Prepared(frame.epoch, rendezvous, self.weights))
            case frames.Form():
                if (prepared := self._in(frame.epoch)) is not None:
                    self.mesh = self._house.mesh(prepared)
                    self.mesh.ranks[prepared.rank] = self
                    self._meet(prepared.epoch, self.now() + frame.deadline_ms / 1000)
            case frames.Load():
                if (prepared := self._in(frame.epoch)) is not None:
                    held = self.weights == _weights(prepared.spec, prepared.rank)
                    self.kernel.tell(self.name, "rank_loading", replica=prepared.replica, epoch=prepared.epoch)
                    self._load(prepared.epoch, LOAD_STAGES if held else 0)
            case frames.Preload():
                self._preloading = frame
                self._preload(frame, 0)
            case frames.Submit():
                if self.engine is not None:
                    self.engine.submit(frame.sequences)
                    self._work()
            case frames.Cancel():
                if self.engine is not None:
                    self.engine.cancel(frame.sequences)
                    self._work()
            case frames.Abort():
                self._leave()
                self.say(frames.Aborted(frame.epoch))
            case frames.Exit():
                self.die(code=0)

    def _in(self, epoch: Epoch) -> frames.Prepare | None:
        prepared = self._prepared
        return prepared if prepared is not None and prepared.epoch == epoch else None

    def _leave(self) -> None:
        self._prepared = self.mesh = self.engine = None
        self._stepping = False
        self.step = 0

    def _fail(self, during: str, text: str) -> None:
        prepared = self._prepared
        assert prepared is not None
        self._leave()
        kind = ReasonKind.GROUP_FAILED
        self.say(frames.Failed(prepared.epoch, during, Reason(kind=kind, text=text, rank=prepared.rank)))

    # ------------------------------------------------------------ coming up

    def _meet(self, epoch: Epoch, deadline: float) -> None:
        mesh = self.mesh
        if self._in(epoch) is None or mesh is None:
            return
        if mesh.whole and not mesh.broken and mesh.moves:
            self.later(FORM_S, self._formed, epoch)
        elif self.now() >= deadline:
            self._fail("form", "a member did not come")
        else:
            self.later(FORM_S, self._meet, epoch, deadline)

    def _formed(self, epoch: Epoch) -> None:
        if (prepared := self._in(epoch)) is not None and self.mesh is not None:
            self.kernel.tell(self.name, "rank_formed", replica=prepared.replica, epoch=epoch)
            self.say(frames.Formed(epoch))

    def _load(self, epoch: Epoch, stage: int) -> None:
        prepared = self._in(epoch)
        mesh = self.mesh
        if prepared is None or mesh is None:
            return
        if mesh.broken:
            self._fail("load", "a member is gone")
            return
        if self.stuck:
            self.later(STUCK_S, self._load, epoch, stage)
            return
        if stage < LOAD_STAGES:
            self.progress += 1
            self.say(frames.LoadProgress(epoch, "reading", stage / LOAD_STAGES))
            self.later(self.kernel.random.uniform(*LOAD_STAGE_S) * self.slow, self._load, epoch, stage + 1)
            return
        mesh.loaded.add(prepared.rank)
        if len(mesh.loaded) < mesh.size:
            self.later(ATTACHED_S, self._load, epoch, stage)
            return
        engine = SimEngine(prepared.spec, epoch)
        self.engine = engine if prepared.rank == 0 else None
        self._hold(prepared.spec, prepared.rank)
        self.say(frames.Loaded(epoch, engine.capacity, self.weights))

    def _preload(self, frame: frames.Preload, stage: int) -> None:
        """Load ahead of need, until something else is wanted."""
        if self._preloading is not frame or self._prepared is not None:
            return
        if self.stuck:
            self.later(STUCK_S, self._preload, frame, stage)
        elif stage < LOAD_STAGES:
            self.progress += 1
            self.later(self.kernel.random.uniform(*LOAD_STAGE_S) * self.slow, self._preload, frame, stage + 1)
        else:
            self._preloading = None
            self._hold(frame.spec, frame.rank)

    def _hold(self, spec: ReplicaSpec, rank: int) -> None:
        self.weights = _weights(spec, rank)
        held = HeldWeights(deployment=spec.deployment, degrees=spec.degrees, rank=rank, fingerprint=self.weights)
        self.say(frames.Holds(held))

    # ------------------------------------------------------------ steps

    def _work(self) -> None:
        if self._stepping or self.engine is None or not self.engine.has_work:
            return
        begun = self.engine.begin()
        self._report()
        if begun is None:
            if (done := self.engine.end()) is not None:
                self.say(done)
            return
        self._stepping = True
        self.say(begun)
        self.step = begun.step
        assert self.mesh is not None
        for rank in self.mesh.ranks.values():
            rank.progress += 1
            rank.collective += not rank.stuck and rank.runs
        if self.engine.poisoned:
            self.later(STEP_S[0], lambda: self.die(code=1))
            return
        self.later(self.kernel.random.uniform(*STEP_S) * self.slow, self._land, begun.epoch)

    def _land(self, epoch: Epoch) -> None:
        """The step's end, once every rank of the mesh took part."""
        mesh = self.mesh
        if self._in(epoch) is None or mesh is None or self.engine is None or not self._stepping:
            return
        if mesh.broken and not self.stuck:
            self._fail("step", "a peer is gone")
            return
        if not mesh.moves:
            self.later(STUCK_S, self._land, epoch)
            return
        self._stepping = False
        self.step = 0
        for rank in mesh.ranks.values():
            rank.progress += 1
        if (done := self.engine.end()) is not None:
            self._done = done
            self.say(done)
        self._report()
        self._work()

    def _report(self) -> None:
        if not self._report_due and self.engine is not None:
            self._report_due = True
            self.later(REPORT_S, self._send_report, self.engine)

    def _send_report(self, engine: SimEngine) -> None:
        self._report_due = False
        if engine is self.engine:
            self.say(engine.report(STEP_S[0] * 1000))


def _weights(spec: ReplicaSpec, rank: int) -> str:
    degrees = spec.degrees
    return f"{spec.model_path}/{rank}of{degrees.tensor * degrees.pipeline}"
