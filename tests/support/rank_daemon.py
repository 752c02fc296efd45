"""A real rank process, driven over its socket as its daemon does; two of them as the ranks of one replica."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from controlplane.runtime.ids import Epoch, NodeId, ReplicaId
from controlplane.runtime.messages.common import Member, ParallelDegrees, ReplicaSpec, Sampling
from controlplane.runtime.messages.weights import HeldWeights, WeightSource
from controlplane.runtime.packing import pack_u32, unpack_u32
from dataplane.frames import (
    LENGTH_BYTES,
    Abort,
    Aborted,
    DaemonFrame,
    Failed,
    Finished,
    Form,
    Formed,
    GroupCost,
    GroupCosts,
    Holds,
    Load,
    Loaded,
    LoadProgress,
    LoadReport,
    Preload,
    Prepare,
    Prepared,
    RankFrame,
    SequenceId,
    StepBegun,
    StepDone,
    Submission,
    Submit,
    decode_rank_frame,
    encode,
)
from dataplane.progress import ProgressPage

ANSWER_S = 60.0
"""Bound on the wait for a frame."""

START_S = 180.0
"""And for a process that imports torch beside others."""

COLLECTIVE_MS = 10_000
FORM_MS = 30_000

PROMPT = [5, 17, 99, 300, 4, 4, 23, 8]

F = TypeVar("F", bound=RankFrame)


class Daemon:
    """The daemon's side of one rank."""

    def __init__(self, folder: Path) -> None:
        self.page = ProgressPage.create(folder / "page")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(folder / "rank.sock"))
        listener.listen(1)
        listener.settimeout(START_S)
        code = "import sys; from dataplane.rank import rank_main; rank_main(*sys.argv[1:])"
        arguments = (str(folder / "rank.sock"), "cpu:0", str(folder / "page"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stderr=log)
        self.socket, _ = listener.accept()
        self.socket.settimeout(ANSWER_S)
        self._stream = self.socket.makefile("rb")
        listener.close()
        self._epoch = 0
        self._next_sequence = 0
        self._last = -1
        self.costs: list[GroupCost] = []
        # How many tokens of each sequence were found cached.
        self.cached: dict[SequenceId, int] = {}
        # What it told last of the weights that it holds.
        self.held: HeldWeights | None = None

    def send(self, frame: DaemonFrame) -> None:
        self.socket.sendall(encode(frame))

    def read(self) -> RankFrame:
        """The next frame; costs of exchanges, which come by the clock, are put aside."""
        while isinstance(frame := self._read(), GroupCosts):
            assert frame.epoch == self._epoch
            self.costs += frame.costs
        if isinstance(frame, LoadReport):
            self.cached |= {item.sequence: item.cached_tokens for item in frame.admitted}
        return frame

    def _read(self) -> RankFrame:
        length = int.from_bytes(self._stream.read(LENGTH_BYTES), "little")
        return decode_rank_frame(self._stream.read(length))

    def expect(self, kind: type[F]) -> F:
        """The next frame, progress, load reports and news of weights aside."""
        while isinstance(frame := self.read(), LoadProgress | LoadReport | Holds) and not isinstance(frame, kind):
            pass
        assert isinstance(frame, kind), frame
        return frame

    def prepare(self, spec: ReplicaSpec, rank: int = 0, ranks: int = 1) -> Prepared:
        self._epoch += 1
        members = tuple(Member(rank=n, node=NodeId(f"n{n}"), device="cpu:0", host="127.0.0.1") for n in range(ranks))
        self.send(Prepare(ReplicaId("r"), Epoch(self._epoch), rank, members, "nonce", spec, COLLECTIVE_MS))
        return self.expect(Prepared)

    def preload(self, spec: ReplicaSpec, rank: int = 0) -> HeldWeights:
        """Let it load another shard than it holds."""
        self.send(Preload(rank, spec, "127.0.0.1"))
        while (told := self.expect(Holds)).held is None:
            assert told.reason is None, told.reason
        return told.held

    def form(self) -> None:
        self.send(Form(Epoch(self._epoch), "", FORM_MS))
        assert self.expect(Formed).epoch == self._epoch

    def load(self, *sources: str) -> tuple[Loaded, list[str]]:
        """The answer, and the stages that were reported."""
        chosen = tuple(WeightSource(degrees=ParallelDegrees(), rank=0, address=address) for address in sources)
        self.send(Load(Epoch(self._epoch), chosen))
        return self.loaded()

    def loaded(self) -> tuple[Loaded, list[str]]:
        stages: list[str] = []
        while isinstance(frame := self.read(), LoadProgress | Holds):
            if isinstance(frame, LoadProgress):
                stages.append(frame.stage)
            else:
                self.held = frame.held
        assert isinstance(frame, Loaded), frame
        return frame, stages

    def serve(self, spec: ReplicaSpec) -> Loaded:
        self.prepare(spec)
        self.form()
        return self.load()[0]

    def submit(self, sampling: Sampling, prompt: list[int] = PROMPT, delivered: list[int] | None = None) -> SequenceId:
        self._next_sequence += 1
        sequence = SequenceId(self._next_sequence)
        body = pack_u32(prompt), pack_u32(delivered or [])
        self.send(Submit((Submission(sequence, *body, sampling, 0, "", True, False, 0),)))
        return sequence

    def finish(self, sequence: SequenceId) -> tuple[list[int], Finished]:
        """All tokens of a sequence, checked to come once and in order after its first index, and its end."""
        tokens: list[int] = []
        while True:
            done = self.steps()
            rows = zip(unpack_u32(done.sequences), unpack_u32(done.first_index), unpack_u32(done.tokens), strict=True)
            for owner, index, token in rows:
                if owner == sequence:
                    assert not tokens or index == self._last + 1
                    self._last = index
                    tokens.append(token)
            for finished in done.finished:
                if finished.sequence == sequence:
                    return tokens, finished

    def steps(self) -> StepDone:
        """The next finished step."""
        while isinstance(frame := self.read(), StepBegun | LoadReport):
            pass
        assert isinstance(frame, StepDone), frame
        return frame

    def cached_of(self, sequence: SequenceId) -> int:
        while sequence not in self.cached:
            self.read()
        return self.cached[sequence]

    def leave(self) -> None:
        self.page.set_abort_epoch(self._epoch)
        self.send(Abort(Epoch(self._epoch)))
        while not isinstance(frame := self.read(), Aborted):
            # A follower that was freed tells so before it reads the Abort.
            assert isinstance(frame, StepBegun | StepDone | LoadReport | Failed), frame
        assert frame.epoch == self._epoch

    def close(self) -> None:
        self._stream.close()
        self.socket.close()
        if self.process.poll() is None:
            self.process.wait(ANSWER_S)


class Pair:
    """Two ranks of one replica, each with its daemon."""

    def __init__(self, driver: Daemon, follower: Daemon) -> None:
        self.driver = driver
        self.follower = follower

    def serve(self, spec: ReplicaSpec) -> list[str]:
        """Bring up the next epoch; returns the stages of loading that the follower reported."""
        address = self.driver.prepare(spec, 0, 2).rendezvous
        self.follower._epoch = self.driver._epoch - 1
        assert self.follower.prepare(spec, 1, 2).rendezvous == ""
        for daemon in (self.driver, self.follower):
            daemon.send(Form(Epoch(daemon._epoch), address, FORM_MS))
        for daemon in (self.driver, self.follower):
            daemon.expect(Formed)
            daemon.send(Load(Epoch(daemon._epoch)))
        capacities = [daemon.loaded() for daemon in (self.driver, self.follower)]
        # Each names the part of the weights that it holds; only the driver's word counts.
        driver, follower = (replace(frame.capacity, fingerprint="") for frame, _ in capacities)
        assert driver == follower
        return capacities[1][1]
