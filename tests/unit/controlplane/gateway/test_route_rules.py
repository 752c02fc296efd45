"""The request's state table, row by row: routing, losses and bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.gateway.messages import (
    ConnectWorker,
    Counted,
    Failed,
    Failure,
    LeaderLost,
    LeaderOpened,
    LeaderSaid,
    Tick,
    WorkerBroken,
    WorkerGone,
    WorkerUp,
)
from controlplane.gateway.state import JournalLimits
from controlplane.runtime.ids import Attempt, Epoch, NodeId, ReplicaId, RequestId, Slot
from controlplane.runtime.messages.common import SOLO_TOKENS, Reason, ReasonKind
from controlplane.runtime.messages.route import (
    CancelRequest,
    JournalPhase,
    MoveRequests,
    ReplicaEpoch,
    ReplicaTable,
    RouteCause,
    RouteCode,
)
from controlplane.runtime.messages.serve import (
    CancelSlots,
    EndRequests,
    OpenCode,
    OpenRefused,
    SlotsLost,
)
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
    bodies,
    closed,
    failures,
    opens,
    phase,
    refused,
    routed,
    row,
    said,
    tokens,
)


class TestRouting:
    def test_a_new_request_asks_the_leader(self):
        core = Core()
        (ask,) = asks(core.do(LeaderOpened(), accepted()))
        assert (ask.entry.attempt, ask.entry.cause) == (1, RouteCause.NEW)

    def test_without_a_leader_the_inventory_asks(self):
        core = Core()
        assert asks(core.do(accepted())) == []
        (chunk,) = core.state.inventory(core.now)
        assert chunk.last
        assert chunk.journals[0].phase is JournalPhase.ROUTING

    def test_a_permit_opens_a_stream_and_then_sends_the_body(self):
        core = Core()
        effects = core.do(LeaderOpened(), accepted(), routed())
        assert ConnectWorker(W1, NodeId("n")) in effects
        assert opens(effects) == []
        (body,) = opens(core.do(WorkerUp(W1)))
        assert body.permit.attempt == 1
        assert phase(core) is JournalPhase.OPENING

    def test_a_permit_of_another_attempt_is_dropped_and_counted(self):
        core = Core()
        core.running()
        assert core.do(routed(attempt=1, worker=W2)) == [Counted("routed_stale")]
        assert core.do(routed(attempt=7)) == [Counted("routed_stale")]

    def test_a_permit_of_an_older_attempt_does_not_place_the_next_one(self):
        core = Core()
        core.running()
        core.do(closed())
        assert core.do(routed(attempt=1, worker=W2)) == [Counted("routed_stale")]
        assert phase(core) is JournalPhase.ROUTING

    def test_a_full_queue_refuses_a_new_request_with_its_delay(self):
        core = Core()
        core.do(LeaderOpened(), accepted())
        (failed,) = failures(core.do(refused(RouteCode.OVERLOADED, retry_ms=700)))
        assert (failed.failure, failed.retry_ms) == (Failure.OVERLOADED, 700)
        assert core.state.journals == {}

    def test_a_full_queue_does_not_refuse_a_replay(self):
        core = Core()
        core.running()
        core.do(closed())
        assert failures(core.do(refused(RouteCode.OVERLOADED, attempt=2, retry_ms=700))) == []
        core.now += 1
        (ask,) = asks(core.do(Tick()))
        assert ask.entry.attempt == 2

    def test_a_resumed_stream_asks_above_the_attempts_it_never_saw(self):
        core = Core()
        core.do(LeaderOpened(), accepted())
        (ask,) = asks(core.do(refused(RouteCode.STALE_ATTEMPT, newest=6)))
        assert ask.entry.attempt == 7
        assert core.do(refused(RouteCode.STALE_ATTEMPT, newest=9)) == [Counted("refused_stale")], "a late word"
        assert phase(core) is JournalPhase.ROUTING

    @pytest.mark.parametrize(
        ("code", "failure"),
        [
            (RouteCode.UNKNOWN_DEPLOYMENT, Failure.UNKNOWN_MODEL),
            (RouteCode.TOO_LONG, Failure.TOO_LONG),
            (RouteCode.DEADLINE, Failure.DEADLINE),
            (RouteCode.POISON, Failure.POISON),
            (RouteCode.DEPLOYMENT_FAILED, Failure.UNAVAILABLE),
        ],
    )
    def test_a_final_refusal_ends_the_request(self, code: RouteCode, failure: Failure):
        core = Core()
        core.do(LeaderOpened(), accepted())
        assert [failed.failure for failed in failures(core.do(refused(code)))] == [failure]

    def test_without_a_replica_a_new_request_waits_a_grace_and_fails(self):
        core = Core()
        core.do(LeaderOpened(), accepted(), refused(RouteCode.NO_REPLICA, retry_ms=60_000))
        core.now += TIMINGS.leader_grace - 0.01
        assert failures(core.do(Tick())) == []
        core.now += 0.02
        (failed,) = failures(core.do(Tick()))
        assert failed.failure is Failure.UNAVAILABLE

    def test_a_replica_that_comes_up_is_asked_for_at_once(self):
        core = Core()
        core.do(LeaderOpened(), accepted(), refused(RouteCode.NO_REPLICA, retry_ms=60_000))
        assert len(asks(core.do(LeaderSaid(ReplicaTable(full=False, rows=(row(),)))))) == 1

    def test_without_a_leader_a_new_request_waits_a_grace_and_fails(self):
        core = Core()
        core.do(accepted())
        core.now += TIMINGS.leader_grace + 0.01
        assert [failed.failure for failed in failures(core.do(Tick()))] == [Failure.UNAVAILABLE]

    def test_a_replay_waits_for_a_leader_until_its_deadline(self):
        core = Core()
        core.running()
        core.do(LeaderLost(), closed())
        core.now += 100 * TIMINGS.leader_grace
        assert failures(core.do(Tick())) == []
        core.now = 1e6 + 1
        assert [failed.failure for failed in failures(core.do(Tick()))] == [Failure.DEADLINE]

    def test_a_new_leader_takes_the_same_attempt(self):
        core = Core()
        core.do(LeaderOpened(), accepted(), LeaderLost())
        (chunk,) = core.state.inventory(core.now)
        assert chunk.journals[0].entry.attempt == 1
        assert opens(core.do(LeaderOpened(), routed(), WorkerUp(W1)))

    def test_an_operators_cancel_ends_it_with_the_reason(self):
        core = Core()
        core.running()
        effects = core.do(LeaderSaid(CancelRequest(request=R, reason=Reason(kind=ReasonKind.ADMIN, text="asked"))))
        assert [failed.failure for failed in failures(effects)] == [Failure.CANCELLED]
        assert [type(body) for body in bodies(effects)] == [CancelSlots, EndRequests]


class TestLoss:
    def test_a_closed_replica_replays_from_the_delivered_tokens(self):
        core = Core()
        (slot,) = core.running()
        core.do(tokens(slot, 0, [5, 6]))
        (ask,) = asks(core.do(closed()))
        assert (ask.entry.attempt, ask.entry.cause, ask.entry.delivered_tokens) == (2, RouteCause.LOST, 2)
        core.do(tokens(slot, 2, [99]))
        core.do(routed(attempt=2, worker=W2), WorkerUp(W2), admitted(attempt=2, worker=W2))
        (new,) = core.slots()
        core.do(tokens(new, 2, [7], worker=W2))
        assert core.delivered() == [5, 6, 7]

    def test_a_second_piece_of_news_finds_nothing_to_do(self):
        core = Core()
        (slot,) = core.running()
        core.do(said(SlotsLost(slots=(slot,), reason=WHY)))
        assert core.do(closed(), said(SlotsLost(slots=(slot,), reason=WHY)), WorkerGone(W1, WHY)) == []
        assert core.state.journals[R].attempt == 2

    def test_another_epochs_closing_is_none_of_its_business(self):
        core = Core()
        core.running()
        assert core.do(closed(epoch=2)) == []

    def test_a_table_with_a_higher_epoch_is_news_too(self):
        core = Core()
        core.running()
        effects = core.do(LeaderSaid(ReplicaTable(full=True, rows=(row(epoch=2),))))
        assert [ask.entry.attempt for ask in asks(effects)] == [2]

    def test_losses_are_limited_by_retries(self):
        core = Core(max_retries=1)
        core.running()
        core.do(closed())
        core.do(routed(attempt=2, worker=W2), WorkerUp(W2))
        (failed,) = failures(core.do(closed(W2)))
        assert failed.failure is Failure.RETRIES

    def test_a_gateway_that_is_cut_off_spends_no_retries(self):
        core = Core()
        rows = tuple(replace(row(worker), max_retries=0) for worker in (W1, W2))
        core.do(LeaderOpened(), accepted(), LeaderSaid(ReplicaTable(full=True, rows=rows)), routed())
        assert not core.state.cut_off_s(core.now), "streams that begin prove nothing"
        core.do(WorkerBroken(W1, core.now))
        core.now += 1
        assert not core.state.cut_off_s(core.now), "one of two"
        core.do(WorkerBroken(W2, core.now))
        core.now += 0.5
        assert core.state.cut_off_s(core.now) == 0.5, "since the last of them broke"
        for attempt in range(2, 6):
            core.now += 2 * TIMINGS.session_silence
            (ask,) = asks(core.do(Tick()))
            assert (ask.entry.attempt, ask.entry.cause) == (attempt, RouteCause.UNREACHABLE)
            core.do(routed(attempt=attempt, worker=W2))
        core.do(WorkerUp(W2))
        assert not core.state.cut_off_s(core.now)
        (failed,) = failures(core.do(closed(W2)))
        assert failed.failure is Failure.RETRIES, "this attempt had its body"

    def test_a_gateway_without_replicas_is_not_cut_off(self):
        core = Core()
        core.running()
        core.do(WorkerBroken(W1, core.now))
        core.now += 1
        assert not core.state.cut_off_s(core.now)

    def test_planned_moves_cost_no_retry(self):
        core = Core(max_retries=0)
        core.running()
        move = MoveRequests(replica=ReplicaId(f"r-{W1}"), epoch=Epoch(1), deadline_ms=0, reason=WHY)
        (ask,) = asks(core.do(LeaderSaid(move)))
        assert ask.entry.cause is RouteCause.PLANNED
        core.do(routed(attempt=2, worker=W2), WorkerUp(W2))
        assert failures(core.do(closed(W2, kind=ReasonKind.DRAINING))) == []

    def test_a_move_that_names_others_leaves_this_one(self):
        core = Core()
        core.running()
        move = MoveRequests(
            replica=ReplicaId(f"r-{W1}"), epoch=Epoch(1), requests=(RequestId("b" * 32),), deadline_ms=0, reason=WHY
        )
        assert core.do(LeaderSaid(move)) == []

    def test_a_second_crash_ends_a_poison_request(self):
        core = Core()
        (slot,) = core.running()
        (ask,) = asks(core.do(said(SlotsLost(slots=(slot,), reason=WHY, suspect=True))))
        assert ask.entry.crashes == 1
        core.do(routed(attempt=2, worker=W2), WorkerUp(W2))
        (failed,) = failures(core.do(closed(W2, suspects=(R,))))
        assert failed.failure is Failure.POISON

    def test_progress_after_a_crash_acquits(self):
        core = Core()
        core.do(LeaderOpened(), accepted(max_tokens=64), routed(), WorkerUp(W1), admitted())
        (slot,) = core.slots()
        core.do(said(SlotsLost(slots=(slot,), reason=WHY, suspect=True)))
        core.do(routed(attempt=2, worker=W2), WorkerUp(W2))
        core.do(tokens(core.slots()[0], 0, list(range(SOLO_TOKENS)), worker=W2))
        assert not core.state.journals[R].crashes
        core.do(closed(W1, suspects=(R,)))
        assert not core.state.journals[R].crashes, "late news of the first engine proves nothing"
        (ask,) = asks(core.do(closed(W2, suspects=(R,))))
        assert ask.entry.crashes == 1

    def test_the_same_crash_told_twice_counts_once(self):
        core = Core()
        (slot,) = core.running()
        core.do(said(SlotsLost(slots=(slot,), reason=WHY, suspect=True)), closed(suspects=(R,)))
        assert len(core.state.journals[R].crashes) == 1

    def test_a_crash_told_after_the_loss_still_counts(self):
        core = Core()
        core.running()
        core.do(WorkerBroken(W1, core.now), WorkerGone(W1, WHY), closed(suspects=(R,)))
        assert len(core.state.journals[R].crashes) == 1

    @pytest.mark.parametrize("code", [OpenCode.FULL, OpenCode.DRAINING, OpenCode.STALE_EPOCH])
    def test_a_workers_refusal_asks_again_without_it(self, code: OpenCode):
        core = Core(max_retries=0)
        core.do(LeaderOpened(), accepted(), routed(), WorkerUp(W1))
        refusal = OpenRefused(request=R, attempt=Attempt(1), code=code, reason=WHY)
        (ask,) = asks(core.do(said(refusal)))
        assert ask.entry.exclude == (ReplicaEpoch(replica=ReplicaId(f"r-{W1}"), epoch=Epoch(1)),)
        assert core.do(said(refusal)) == [Counted("open_refused_stale")]

    def test_refusals_back_off_and_end(self):
        core = Core(JournalLimits(refusals_max=3))
        core.do(LeaderOpened(), accepted(), routed(), WorkerUp(W1))
        for attempt in range(1, 4):
            refusal = OpenRefused(request=R, attempt=Attempt(attempt), code=OpenCode.FULL, reason=WHY)
            core.do(said(refusal))
            core.now += TIMINGS.reconnect_max * 2
            core.do(Tick(), routed(attempt=attempt + 1))
        refusal = OpenRefused(request=R, attempt=Attempt(4), code=OpenCode.FULL, reason=WHY)
        assert [failed.failure for failed in failures(core.do(said(refusal)))] == [Failure.OVERLOADED]

    @pytest.mark.parametrize(
        ("code", "failure"), [(OpenCode.TOO_LONG, Failure.TOO_LONG), (OpenCode.INVALID, Failure.INVALID)]
    )
    def test_a_body_no_worker_would_take_is_refused(self, code: OpenCode, failure: Failure):
        core = Core()
        core.do(LeaderOpened(), accepted(), routed(), WorkerUp(W1))
        refusal = OpenRefused(request=R, attempt=Attempt(1), code=code, reason=WHY)
        assert [failed.failure for failed in failures(core.do(said(refusal)))] == [failure]


class TestBounds:
    def test_journal_tokens_are_bounded(self):
        core = Core(JournalLimits(journal_tokens_max=5))
        core.do(LeaderOpened(), accepted())
        (failed,) = failures(core.do(accepted(RequestId("b" * 32))))
        assert failed.failure is Failure.OVERLOADED
        assert failed.retry_ms > 0

    def test_a_request_id_that_is_open_is_refused(self):
        core = Core()
        core.do(LeaderOpened(), accepted())
        assert [type(effect) for effect in core.do(accepted())] == [Failed]
        assert len(core.state.journals) == 1

    def test_slots_are_never_used_again(self):
        core = Core()
        seen: list[Slot] = core.running(n=2)
        for attempt in range(2, 4):
            core.do(closed(epoch=attempt - 1), routed(attempt=attempt, epoch=attempt))
            seen += core.slots()
        assert len(seen) == len(set(seen)) == 6
