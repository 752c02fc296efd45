"""Leader and etcd both away: requests run on what the last replica table says."""

from __future__ import annotations

from dataclasses import replace

from controlplane.gateway.messages import Effect, LeaderLost, LeaderOpened, LeaderSaid, Tick, WorkerBroken, WorkerUp
from controlplane.runtime.ids import Attempt, RequestId, Term
from controlplane.runtime.messages.common import PermitMode, Reason, ReasonKind
from controlplane.runtime.messages.route import JournalPhase, ReplicaTable
from controlplane.runtime.messages.serve import OpenCode, OpenRefused, SlotsLost
from tests.unit.controlplane.gateway.builders import (
    TIMINGS,
    W1,
    W2,
    WHY,
    Core,
    R,
    accepted,
    admitted,
    asks,
    failures,
    opens,
    phase,
    row,
    said,
)

AWAY_S = TIMINGS.heartbeat_interval


def left_alone() -> Core:
    """A gateway whose leader, of term 7, is gone."""
    core = Core()
    core.do(LeaderOpened(Term(7)), LeaderSaid(ReplicaTable(full=True, rows=(row(W1), row(W2)))))
    core.do(WorkerUp(W1), WorkerUp(W2), LeaderLost())
    return core


def wait(core: Core, seconds: float) -> list[Effect]:
    effects: list[Effect] = []
    end = core.now + seconds
    while core.now < end:
        core.now += TIMINGS.reconnect_min
        effects += core.do(Tick())
    return effects


def test_a_request_waits_for_a_successor_and_then_does_without():
    core = left_alone()
    assert not opens(core.do(accepted()))
    assert not opens(wait(core, AWAY_S - 2 * TIMINGS.reconnect_min))
    (body,) = opens(wait(core, AWAY_S))
    permit = body.permit
    assert (permit.mode, permit.term, permit.attempt) == (PermitMode.LEADERLESS, 7, 1)
    core.do(admitted(worker=W1), admitted(worker=W2))
    assert phase(core) == JournalPhase.RUNNING


def test_a_successor_in_time_is_asked_instead():
    core = left_alone()
    core.do(accepted(), LeaderOpened(Term(8)))
    assert not opens(wait(core, 2 * AWAY_S))
    (info,) = next(iter(core.state.inventory(core.now))).journals
    assert info.phase == JournalPhase.ROUTING, "the inventory asks for it"


def test_many_requests_spread_over_the_replicas():
    core = left_alone()
    wait(core, AWAY_S)
    requests = [RequestId(f"{index * 0x9E3779B97F4A7C15:032x}") for index in range(1, 33)]
    bodies = opens(core.do(*(accepted(request) for request in requests)))
    counts = [sum(body.permit.replica == f"r-{worker}" for body in bodies) for worker in (W1, W2)]
    assert sum(counts) == 32
    assert min(counts) >= 8


def test_a_lost_request_goes_to_the_other_replica():
    core = left_alone()
    wait(core, AWAY_S)
    (first,) = opens(core.do(accepted()))
    worker = W1 if first.permit.replica == f"r-{W1}" else W2
    core.do(admitted(worker=worker))
    (slot,) = core.slots()
    (second,) = opens(core.do(said(SlotsLost(slots=(slot,), reason=WHY), worker)))
    assert second.permit.attempt == 2
    assert second.permit.replica != first.permit.replica


def test_a_worker_with_a_leader_refuses_and_is_asked_again_later():
    core = left_alone()
    wait(core, AWAY_S)
    (body,) = opens(core.do(accepted()))
    worker = W1 if body.permit.replica == f"r-{W1}" else W2
    live = Reason(kind=ReasonKind.STALE_TERM, text="a leader is live: only its permits count")
    refusal = OpenRefused(request=R, attempt=Attempt(1), code=OpenCode.STALE_TERM, reason=live)
    core.do(said(refusal, worker))
    core.do(LeaderOpened(Term(8)))
    assert not failures(core.effects)
    assert not asks(core.effects), "its inventory asks"


def test_without_a_worker_to_ask_it_is_told_so_in_the_end():
    core = left_alone()
    core.do(WorkerBroken(W1, core.now), WorkerBroken(W2, core.now), accepted())
    (failed,) = failures(wait(core, 2 * TIMINGS.leader_grace))
    assert failed.reason.text == "no leading coordinator can be reached"


def test_only_the_model_that_a_request_was_made_for_goes_on_with_it():
    core = Core()
    rows = (replace(row(W1), model_path="/other"), row(W2))
    core.do(LeaderOpened(Term(7)), LeaderSaid(ReplicaTable(full=True, rows=rows)))
    core.do(WorkerUp(W1), WorkerUp(W2), LeaderLost())
    for digit in "0123456789abcdef":
        core.do(replace(accepted(RequestId(digit * 32)), model_path="/m"))
    assert {body.permit.replica for body in opens(wait(core, 2 * AWAY_S))} == {f"r-{W2}"}
