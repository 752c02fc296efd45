"""Two real rank processes: of one replica, and from one to the other."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaSpec, Sampling
from dataplane.frames import (
    Abort,
    Aborted,
    Hello,
    Holds,
    Load,
    Preload,
    StepBegun,
)
from tests.support.models import blank_weights, tiny_model
from tests.support.rank_daemon import ANSWER_S, PROMPT, Daemon, Pair
from tests.unit.dataplane.engine.reference import greedy


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("second"))
    daemon.expect(Hello)
    yield daemon
    daemon.close()


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


def test_what_a_failed_step_computed_is_in_no_cache(
    process: Daemon, second: Daemon, spec: ReplicaSpec, model: Path
) -> None:
    """The follower stands still in the midst of a step; the driver has stored its part of the first layer's keys."""
    pair, both = Pair(process, second), replace(spec, degrees=ParallelDegrees(tensor=2))
    sampling = Sampling(temperature=0, max_tokens=3, ignore_eos=True)
    done, failed = list(range(40)), list(range(50, 90))
    pair.serve(both)
    process.finish(process.submit(sampling, done))
    os.kill(second.process.pid, signal.SIGSTOP)
    process.submit(sampling, failed)
    process.expect(StepBegun)
    process.leave()
    os.kill(second.process.pid, signal.SIGCONT)
    second.leave()
    pair.serve(both)
    for prompt in (failed, done):
        for cached in (0, 32):
            sequence = process.submit(sampling, prompt)
            assert process.finish(sequence)[0] == greedy(model, prompt, 3)
            assert process.cached_of(sequence) == cached
    process.leave()
    second.leave()


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
