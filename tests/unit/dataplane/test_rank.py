"""A real rank process, driven over its socket as its daemon does."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from controlplane.runtime.ids import DeploymentId, Epoch, NodeId, ReplicaId
from controlplane.runtime.messages.common import Member, ParallelDegrees, ReasonKind, ReplicaSpec, Sampling
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.messages.session import HeldWeights, WeightSource
from controlplane.runtime.packing import pack_u32, unpack_u32
from dataplane.frames import (
    LENGTH_BYTES,
    Abort,
    Aborted,
    Cancel,
    DaemonFrame,
    Exit,
    Failed,
    Finished,
    Form,
    Formed,
    GroupCost,
    GroupCosts,
    Hello,
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
from tests.support.models import blank_weights, tiny_model
from tests.unit.dataplane.engine.reference import greedy

ANSWER_S = 60.0
"""Bound on the wait for a frame."""

START_S = 180.0
"""And for a process that imports torch beside others."""

COLLECTIVE_MS = 10_000
FORM_MS = 30_000

SLACK_BYTES = 16 * 1024 * 1024
"""Address space left for everything but large tensors."""

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
        # What it told last of the weights that it holds.
        self.held: HeldWeights | None = None

    def send(self, frame: DaemonFrame) -> None:
        self.socket.sendall(encode(frame))

    def read(self) -> RankFrame:
        """The next frame; costs of exchanges, which come by the clock, are put aside."""
        while isinstance(frame := self._read(), GroupCosts):
            assert frame.epoch == self._epoch
            self.costs += frame.costs
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(scope="module")
def spec(model: Path) -> ReplicaSpec:
    return ReplicaSpec(deployment=DeploymentId("d"), model_path=str(model), kv_cache_tokens=2048, cpu_threads=1)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("rank"))
    hello = daemon.expect(Hello)
    assert (hello.pid, hello.device) == (daemon.process.pid, "cpu:0")
    yield daemon
    daemon.send(Exit())
    assert daemon.process.wait(ANSWER_S) == 0, "a rank leaves in order when told"
    daemon.close()


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("second"))
    daemon.expect(Hello)
    yield daemon
    daemon.close()


@pytest.fixture
def daemon(process: Daemon, spec: ReplicaSpec) -> Iterator[Daemon]:
    """A rank that serves."""
    process.serve(spec)
    yield process
    process.leave()


def test_tokens_are_those_of_transformers(daemon: Daemon, model: Path) -> None:
    first = daemon.submit(Sampling(temperature=0, max_tokens=20, ignore_eos=True))
    tokens, finished = daemon.finish(first)
    assert tokens == greedy(model, PROMPT, 20)
    assert finished.reason is FinishReason.LENGTH


def test_step_is_announced_before_its_tokens(daemon: Daemon) -> None:
    sequence = daemon.submit(Sampling(temperature=0, max_tokens=1))
    begun = daemon.expect(StepBegun)
    done = daemon.expect(StepDone)
    assert begun.step == done.step
    assert list(unpack_u32(begun.sequences)) == [sequence] == list(unpack_u32(done.sequences))
    assert daemon.page.step == 0
    assert daemon.page.progress > 0


def test_replay_goes_on_where_the_delivered_tokens_end(daemon: Daemon) -> None:
    sampling = Sampling(temperature=1.1, seed=99, max_tokens=24, ignore_eos=True)
    whole, _ = daemon.finish(daemon.submit(sampling))
    for cut in (1, 9, 23):
        daemon._last = cut - 1
        rest, _ = daemon.finish(daemon.submit(sampling, delivered=whole[:cut]))
        assert rest == whole[cut:]


def test_cancelled_sequence_ends_at_once(daemon: Daemon) -> None:
    sequence = daemon.submit(Sampling(temperature=0, max_tokens=400, ignore_eos=True))
    daemon.steps()
    daemon.send(Cancel((sequence,)))
    tokens, finished = daemon.finish(sequence)
    assert finished.reason is FinishReason.CANCELLED
    assert len(tokens) < 400


def test_load_report_tells_of_admission(daemon: Daemon) -> None:
    sequence = daemon.submit(Sampling(temperature=0, max_tokens=2))
    while not isinstance(report := daemon.read(), LoadReport) or not report.admitted:
        pass
    assert [item.sequence for item in report.admitted] == [sequence]


def test_too_long_prompt_ends_with_a_reason(daemon: Daemon) -> None:
    tokens, finished = daemon.finish(daemon.submit(Sampling(), prompt=[3] * 600))
    assert not tokens
    assert finished.reason is FinishReason.ERROR
    assert finished.error is not None
    assert finished.error.kind is ReasonKind.INVALID
    assert "600 tokens" in finished.error.text


def test_weights_stay_for_the_next_epoch(process: Daemon, spec: ReplicaSpec) -> None:
    loaded = process.serve(spec)
    process.leave()
    prepared = process.prepare(replace(spec, deployment=DeploymentId("another")))
    assert prepared.weights == loaded.weights != ""
    process.form()
    again, stages = process.load()
    assert again == replace_epoch(loaded, again.epoch)
    assert stages == []
    process.leave()


def test_other_cache_keeps_the_weights(process: Daemon, spec: ReplicaSpec) -> None:
    process.serve(spec)
    process.leave()
    process.prepare(replace(spec, kv_cache_tokens=1024))
    process.form()
    loaded, stages = process.load()
    assert loaded.capacity.total_blocks == 64
    assert "weights" not in stages
    process.leave()


def test_failed_load_is_told_and_survived(process: Daemon, spec: ReplicaSpec, tmp_path: Path) -> None:
    process.prepare(replace(spec, model_path=str(tmp_path)))
    process.form()
    process.send(Load(Epoch(process._epoch)))
    failed = process.expect(Failed)
    assert failed.during == "load"
    assert "config.json" in failed.reason.text
    assert process.serve(spec).capacity.total_blocks == 128
    process.leave()


def test_step_out_of_memory_is_told_and_survived(process: Daemon, tmp_path: Path) -> None:
    """The logits of a whole prompt over a large vocabulary are more than the process may take."""
    wide = ReplicaSpec(
        deployment=DeploymentId("d"),
        model_path=str(tiny_model(tmp_path, "llama", vocab_size=40_000)),
        kv_cache_tokens=1024,
        cpu_threads=1,
    )
    process.serve(wide)
    pid = process.process.pid
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + SLACK_BYTES, before[1]))
    try:
        process.submit(Sampling(temperature=0, max_tokens=1, prompt_logprobs=0), prompt=list(range(400)))
        while not isinstance(frame := process.read(), Failed):
            assert isinstance(frame, StepBegun | StepDone | LoadReport)
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert frame.during == "step"
    assert frame.reason.kind is ReasonKind.OUT_OF_MEMORY
    process.serve(wide)
    told = process.log.read_text()
    assert "Traceback (most recent call last)" in told
    # To show tensors takes seconds, in which the rank is missed by its group; and prompts are nobody's business.
    assert "tensor(" not in told
    tokens, _ = process.finish(process.submit(Sampling(temperature=0, max_tokens=3, ignore_eos=True)))
    assert len(tokens) == 3
    process.leave()


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


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_two_ranks_serve_as_one_and_again_after_an_abort(
    process: Daemon, second: Daemon, spec: ReplicaSpec, model: Path, axis: str
) -> None:
    """The follower waits in an exchange when its epoch ends; both keep their weights for the next one."""
    pair = Pair(process, second)
    both = replace(spec, degrees=ParallelDegrees(**{axis: 2}))
    expected = greedy(model, PROMPT, 12)
    for epoch in range(2):
        stages = pair.serve(both)
        assert ("weights" in stages) == (epoch == 0)
        tokens, _ = process.finish(process.submit(Sampling(temperature=0, max_tokens=12, ignore_eos=True)))
        assert tokens == expected
        process.leave()
        second.leave()
    for daemon in (process, second):
        assert {"control", axis} <= {cost.group for cost in daemon.costs}
        assert all(cost.calls > 0 and cost.seconds >= 0 for cost in daemon.costs)


def test_weights_loaded_ahead_are_not_read_again(second: Daemon, spec: ReplicaSpec, tmp_path: Path) -> None:
    """A free rank holds both shards of two in turn; it serves the second though the file holds other values by then."""
    path = tmp_path / "copy"
    shutil.copytree(spec.model_path, path)
    copied = replace(spec, model_path=str(path))
    both = replace(copied, degrees=ParallelDegrees(tensor=2))
    shard = second.preload(both, rank=1)
    assert (shard.degrees, shard.rank) == (both.degrees, 1)
    held = second.preload(copied)
    assert held.fingerprint != shard.fingerprint
    assert held.address == shard.address != ""
    blank_weights(path)
    # A leader that has forgotten asks again, and is answered.
    assert second.preload(copied) == held
    assert second.prepare(copied).weights == held.fingerprint
    second.form()
    loaded, stages = second.load()
    assert loaded.weights == held.fingerprint
    assert "weights" not in stages
    tokens, _ = second.finish(second.submit(Sampling(temperature=0, max_tokens=12, ignore_eos=True)))
    assert tokens == greedy(Path(spec.model_path), PROMPT, 12)
    second.leave()


def test_an_epoch_is_heard_of_while_weights_are_loaded(second: Daemon, spec: ReplicaSpec, tmp_path: Path) -> None:
    """The epoch is of the same shard, and goes on with what is there."""
    large = replace(spec, model_path=str(tiny_model(tmp_path, "llama", hidden_size=512, intermediate_size=6144)))
    second.send(Preload(0, large, "127.0.0.1"))
    prepared = second.prepare(large)
    assert prepared.weights == ""
    second.form()
    second.load()
    assert second.held is not None
    tokens, _ = second.finish(second.submit(Sampling(temperature=0, max_tokens=3, ignore_eos=True)))
    assert tokens == greedy(Path(large.model_path), PROMPT, 3)
    second.leave()


def test_a_load_is_left_when_its_epoch_is_over(second: Daemon, spec: ReplicaSpec) -> None:
    """As after a peer's death; the next epoch loads."""
    other = replace(spec, dtype="bfloat16")
    second.prepare(other)
    second.form()
    second.page.set_abort_epoch(second._epoch)
    second.send(Load(Epoch(second._epoch)))
    second.send(Abort(Epoch(second._epoch)))
    assert second.expect(Aborted).epoch == second._epoch
    assert second.serve(other).weights
    second.leave()


def test_a_failed_preload_is_told_and_survived(second: Daemon, spec: ReplicaSpec, tmp_path: Path) -> None:
    second.send(Preload(0, replace(spec, model_path=str(tmp_path)), "127.0.0.1"))
    told = second.expect(Holds)
    if told.reason is None:
        # What it held before went first.
        told = second.expect(Holds)
    assert told.held is None
    assert told.reason is not None
    assert "config.json" in told.reason.text
    assert second.preload(spec).rank == 0


def test_a_peer_that_serves_is_asked_for_its_weights(
    process: Daemon, second: Daemon, spec: ReplicaSpec, model: Path
) -> None:
    process.serve(spec)
    assert process.held is not None
    second.preload(replace(spec, degrees=ParallelDegrees(tensor=2)))
    second.prepare(spec)
    second.form()
    second.load(process.held.address)
    assert second.held is not None
    assert second.held.fingerprint == process.held.fingerprint
    assert f"{process.held.address}=" in second.log.read_text()
    for daemon in (process, second):
        tokens, _ = daemon.finish(daemon.submit(Sampling(temperature=0, max_tokens=12, ignore_eos=True)))
        assert tokens == greedy(model, PROMPT, 12)
        daemon.leave()


def test_rank_leaves_when_its_daemon_is_gone(second: Daemon) -> None:
    second.socket.shutdown(socket.SHUT_RDWR)
    assert second.process.wait(ANSWER_S) == 0


def replace_epoch(loaded: Loaded, epoch: Epoch) -> Loaded:
    return Loaded(epoch, loaded.capacity, loaded.weights)
