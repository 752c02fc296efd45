"""A real rank process, driven over its socket as its daemon does."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.runtime.ids import DeploymentId, Epoch, NodeId, ReplicaId
from controlplane.runtime.messages.common import Member, ReasonKind, ReplicaSpec, Sampling
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.packing import unpack_u32
from dataplane.devices import CPU_RANKS
from dataplane.frames import (
    Cancel,
    Failed,
    Load,
    Loaded,
    LoadReport,
    Prepare,
    StepBegun,
    StepDone,
)
from dataplane.rank import cpu_threads
from tests.support.models import tiny_model
from tests.support.rank_daemon import PROMPT, Daemon
from tests.unit.dataplane.engine.reference import greedy

SLACK_BYTES = 16 * 1024 * 1024
"""Address space left for everything but large tensors."""


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


@pytest.mark.parametrize(
    ("asked", "on_host", "ranks", "threads"),
    [(0, "", 2, 4), (0, "4", 1, 2), (0, "1", 2, 4), (0, "16", 1, 1), (3, "4", 1, 3)],
)
def test_cores_are_shared_by_all_ranks_of_the_host(
    monkeypatch: pytest.MonkeyPatch, asked: int, on_host: str, ranks: int, threads: int
) -> None:
    """Threads beyond the cores wait for each other in every operation: ten times slower, where two replicas did."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    if on_host:
        monkeypatch.setenv(CPU_RANKS, on_host)
    members = tuple(Member(rank=rank, node=NodeId("n"), device=f"cpu:{rank}", host="h") for rank in range(ranks))
    spec = ReplicaSpec(deployment=DeploymentId("d"), model_path="m", cpu_threads=asked)
    assert cpu_threads(Prepare(ReplicaId("r"), Epoch(1), 0, members, "nonce", spec, 1000)) == threads


def replace_epoch(loaded: Loaded, epoch: Epoch) -> Loaded:
    return Loaded(epoch, loaded.capacity, loaded.weights)
