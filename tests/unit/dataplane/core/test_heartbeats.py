"""What the leader hears without asking."""

from __future__ import annotations

import pytest

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.messages.session import Heartbeat, WorkerSnapshot
from dataplane import frames
from dataplane.core import health, leader
from dataplane.core.messages import Effect, RankSample, SendLeader
from tests.scenario.worker.model import CAPACITY, TIMINGS, Worker, serving


def beats(effects: list[Effect]) -> list[Heartbeat]:
    return [effect.body for effect in effects if isinstance(effect, SendLeader) and isinstance(effect.body, Heartbeat)]


def report(running: int, waiting: int = 0) -> frames.LoadReport:
    return frames.LoadReport(
        epoch=Epoch(1),
        free_blocks=9,
        running=running,
        waiting=waiting,
        waiting_tokens=0,
        step_ms=2.5,
        queue=((0, 1, 7),),
        prefix_digest=b"digest",
        admitted=(),
    )


def test_one_comes_every_interval_when_nothing_changes() -> None:
    worker = serving()
    worker.wait(1)
    assert len(beats(worker.wait(10 * TIMINGS.heartbeat_interval))) in range(10, 12)


def test_a_change_is_told_soon_but_changes_do_not_flood() -> None:
    worker = serving()
    worker.wait(1)
    told = 0
    for running in range(100):
        worker.says("cpu:0", report(running % 2))
        told += len(beats(worker.tick()))
    assert 20 < told <= 101


def test_a_load_carries_what_the_engine_and_the_pages_say() -> None:
    worker = serving()
    worker.open("g", "a")
    worker.open("g", "b")
    worker.says("cpu:0", report(running=1))
    worker.samples["cpu:0"] = RankSample(progress=42, collective=0, step=3, process_state="R")
    (load,) = beats(worker.wait(1))[-1].replicas
    assert (load.running, load.waiting, load.free_blocks, load.progress) == (1, 1, 9, 42)
    assert load.queue[0].tokens == 7
    assert load.prefix_digest == b"digest"


def starved_s(worker: Worker) -> float:
    return beats(worker.wait(1))[-1].replicas[0].starved_ms / 1000


def test_a_load_says_how_long_a_rank_was_starved() -> None:
    worker = serving(devices=2)
    worker.wait(1)
    worker.samples = {f"cpu:{index}": RankSample(7, 1, 3, "R", starved_s=100.0) for index in range(2)}
    assert starved_s(worker) == 0, "what was before is not known to have held anything up"
    worker.samples["cpu:1"] = RankSample(7, 1, 3, "R", starved_s=100.5)
    assert starved_s(worker) == 0.5, "one starved rank holds all up"
    worker.samples = {f"cpu:{index}": RankSample(7, 1, 3, "R", starved_s=101.0) for index in range(2)}
    assert starved_s(worker) == 1.5, "the hungriest at each look"


def test_a_daemon_that_did_not_run_saw_nobody_stand_still() -> None:
    worker = serving()
    worker.wait(1)
    worker.freeze(12)
    assert starved_s(worker) == 12


def test_a_replica_that_has_not_reported_yet_is_empty() -> None:
    worker = serving()
    (load,) = beats(worker.wait(1))[-1].replicas
    assert (load.free_blocks, load.running, load.waiting) == (CAPACITY.total_blocks, 0, 0)


def test_a_device_on_which_nothing_comes_up_is_sick() -> None:
    worker = serving()
    worker.exits("cpu:0", signal=9)
    assert beats(worker.wait(1))[-1].health[0].ok, "one death is no sickness"
    for _ in range(health.FALSE_STARTS_SICK):
        worker.exits("cpu:0", code=75)
        worker.wait(1)
    told = beats(worker.wait(1))[-1].health[0]
    assert not told.ok
    assert told.reason is not None


def test_a_large_snapshot_comes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "SNAPSHOT_SEQUENCES_MAX", 3)
    worker = serving()
    for name in "abcd":
        worker.open("g", name)
    effects = worker.attach(term=2)
    bodies = [effect.body for effect in effects if isinstance(effect, SendLeader)]
    chunks = [body for body in bodies if isinstance(body, WorkerSnapshot)]
    assert [[info.request for info in chunk.sequences] for chunk in chunks] == [["a", "b", "c"], ["d"]]
    assert [chunk.last for chunk in chunks] == [False, True]
    assert chunks[0].replicas[0].phase is ReplicaPhase.READY
    assert not chunks[1].ranks
