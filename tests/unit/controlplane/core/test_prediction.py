"""Predicted times order replicas as an operator would."""

from __future__ import annotations

from dataclasses import replace

from controlplane.core.load import Load
from controlplane.core.prediction import CROWDING, STEP_S_GUESS, congestion_s, demand, fits, pace, predicted_s
from controlplane.runtime.ids import Epoch, ReplicaId, RequestId
from controlplane.runtime.messages.session import ReplicaLoad
from tests.scenario.coordinator.peers import CAPACITY, entry

ENTRY = entry("r1", prompt=160, max_tokens=50, prefix_hashes=(1, 2, 3))


def load(**fields: object) -> Load:
    values: dict[str, object] = {"free_blocks": 1000, "running": 0, "waiting": 0, "step_ms": 10.0}
    made = Load()
    made.heard(ReplicaLoad(replica=ReplicaId("m-0"), epoch=Epoch(1), **(values | fields)), ack=0)  # type: ignore[arg-type]
    return made


def seconds(of: Load) -> float:
    return predicted_s(ENTRY, of, CAPACITY, 0.01)


def test_work_before_it_makes_it_later() -> None:
    idle = seconds(load())
    assert seconds(load(running=2)) > idle
    assert seconds(load(waiting_tokens=4000)) > idle
    assert seconds(load(running=4, waiting=4)) > seconds(load(running=3))


def test_too_few_free_blocks_make_it_later() -> None:
    assert seconds(load(free_blocks=2)) > seconds(load(free_blocks=900))


def test_a_cached_prefix_makes_it_sooner() -> None:
    digest = b"".join(value.to_bytes(8, "little") for value in (1, 2, 3))
    assert seconds(load(prefix_digest=digest)) < seconds(load())


def test_only_leading_blocks_count_as_cached() -> None:
    digest = (2).to_bytes(8, "little")
    assert load(prefix_digest=digest).cached_blocks((1, 2)) == 0
    assert load(prefix_digest=digest).cached_blocks((2, 1)) == 1


def test_unseen_assignments_count_until_a_heartbeat_knows_of_them() -> None:
    one = load(running=1)
    one.assigned(RequestId("r2"), demand(ENTRY, CAPACITY, 0), ENTRY.prefix_hashes)
    one.sent(RequestId("r2"), 7)
    assert one.sequences == 2
    assert one.prefill_tokens == 160
    assert one.free_blocks(CAPACITY) == 1000 - 10 - 4
    assert one.cached_blocks(ENTRY.prefix_hashes) == 3
    heartbeat = one.heartbeat
    assert heartbeat is not None
    one.heard(replace(heartbeat, running=2), ack=6)
    assert one.sequences == 3
    one.heard(replace(heartbeat, running=2), ack=7)
    assert one.sequences == 2
    assert one.outstanding == {"r2"}
    one.ended(RequestId("r2"))
    assert not one.outstanding


def test_an_assignment_not_yet_sent_is_acknowledged_by_nothing() -> None:
    one = load()
    one.assigned(RequestId("r2"), demand(ENTRY, CAPACITY, 0), ())
    assert one.heartbeat is not None
    one.heard(one.heartbeat, ack=10_000)
    assert one.sequences == 1


def paces(*loads: Load) -> list[float]:
    return [round(value, 6) for value in pace(list(loads), [CAPACITY] * len(loads))]


def test_pace_is_measured_at_work() -> None:
    crowded = load(step_ms=20.0, running=CAPACITY.max_sequences)
    assert paces(crowded) == [round(0.02 / (1 + CROWDING), 6)]


def test_pace_of_the_idle_is_that_of_its_peers() -> None:
    busy = load(step_ms=20.0, running=CAPACITY.max_sequences)
    assert len(set(paces(load(step_ms=900.0), busy, Load()))) == 1
    assert paces(Load()) == [STEP_S_GUESS]


def test_pace_ignores_noise_but_not_slowness() -> None:
    usual, noisy, slow = (load(step_ms=step_ms, running=1) for step_ms in (10.0, 13.0, 100.0))
    at_usual, at_noisy, at_slow = paces(usual, noisy, slow)
    assert at_usual == at_noisy < at_slow


def test_congestion_grows_with_what_is_asked() -> None:
    longer = entry("r2", prompt=1600, max_tokens=500)
    assert congestion_s([longer], CAPACITY, 0.01) > congestion_s([ENTRY], CAPACITY, 0.01) > 0


def test_what_fits_at_all() -> None:
    assert fits(entry("r", prompt=CAPACITY.max_model_tokens - 1), CAPACITY)
    assert not fits(entry("r", prompt=CAPACITY.max_model_tokens), CAPACITY)
    assert not fits(entry("r", prompt=100), replace(CAPACITY, total_blocks=6, max_model_tokens=0))
    assert fits(entry("r", prompt=95), replace(CAPACITY, total_blocks=6, max_model_tokens=0))
