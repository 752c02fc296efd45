"""The request's state table, row by row: state in, event, effects out."""

from __future__ import annotations

import pytest

from controlplane.gateway.messages import (
    ChoiceStopped,
    ClientDrained,
    ClientGone,
    ConnectWorker,
    Counted,
    Deliver,
    DropWorker,
    Effect,
    Failed,
    Failure,
    LeaderLost,
    LeaderOpened,
    LeaderSaid,
    SendWorker,
    Started,
    TellEnd,
    Tick,
    WorkerBroken,
    WorkerGone,
    WorkerUp,
)
from controlplane.gateway.state import JournalLimits
from controlplane.runtime.ids import Attempt, DeploymentId, Epoch, NodeId, ReplicaId, RequestId, Slot
from controlplane.runtime.messages.common import SOLO_TOKENS, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import (
    CancelRequest,
    JournalPhase,
    MoveRequests,
    Outcome,
    ReplicaClosed,
    ReplicaEpoch,
    ReplicaRow,
    ReplicaTable,
    RouteCause,
    RouteCode,
    RoutedBatch,
    RouteRefused,
)
from controlplane.runtime.messages.serve import (
    CancelSlots,
    EndRequests,
    Finish,
    FinishReason,
    OpenCode,
    OpenRefused,
    SlotsLost,
    StepTokens,
    Superseded,
    SyncReply,
    SyncSlots,
    TokenLogprobs,
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
    failures,
    opens,
    routed,
    said,
    tokens,
)


def refused(code: RouteCode, *, attempt: int = 1, retry_ms: int = 0) -> LeaderSaid:
    entry = RouteRefused(request=R, attempt=Attempt(attempt), code=code, reason=WHY, retry_ms=retry_ms)
    return LeaderSaid(RoutedBatch(refused=(entry,)))


def closed(worker: str = W1, *, epoch: int = 1, suspects: tuple[RequestId, ...] = (), kind: ReasonKind = WHY.kind):
    reason = Reason(kind=kind, text="closed")
    return LeaderSaid(
        ReplicaClosed(replica=ReplicaId(f"r-{worker}"), epoch=Epoch(epoch), reason=reason, suspects=suspects)
    )


def row(worker: str = W1, *, epoch: int = 1, phase: ReplicaPhase = ReplicaPhase.READY) -> ReplicaRow:
    return ReplicaRow(
        replica=ReplicaId(f"r-{worker}"),
        epoch=Epoch(epoch),
        phase=phase,
        node=NodeId("n"),
        serve_address=worker,
        deployment=DeploymentId("demo"),
        model_path="/m",
        model="m",
        numerics="exact",
    )


def bodies(effects: list[Effect]) -> list[object]:
    return [effect.body for effect in effects if isinstance(effect, SendWorker)]


def phase(core: Core) -> JournalPhase:
    return core.state.journals[R].phase


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

    @pytest.mark.parametrize(
        ("code", "failure"),
        [
            (RouteCode.UNKNOWN_DEPLOYMENT, Failure.UNKNOWN_MODEL),
            (RouteCode.TOO_LONG, Failure.TOO_LONG),
            (RouteCode.DEADLINE, Failure.DEADLINE),
            (RouteCode.POISON, Failure.POISON),
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


class TestRunning:
    def test_tokens_go_to_the_client_once_and_in_order(self):
        core = Core()
        (slot,) = core.running()
        core.do(tokens(slot, 0, [5, 6]), tokens(slot, 0, [5, 6]), tokens(slot, 1, [6, 7]))
        assert core.delivered() == [5, 6, 7]
        assert Counted("tokens_repeated", 2) in core.effects

    def test_a_first_token_is_as_good_as_an_admission(self):
        core = Core()
        core.do(LeaderOpened(), accepted(), routed(), WorkerUp(W1))
        assert Started(R, 0) in core.do(tokens(core.slots()[0], 0, [5]))
        assert phase(core) is JournalPhase.RUNNING

    def test_a_gap_is_not_delivered_but_synced_once(self):
        core = Core()
        (slot,) = core.running()
        first = core.do(tokens(slot, 2, [7]))
        again = core.do(tokens(slot, 3, [8]))
        assert [type(body) for body in bodies(first)] == [SyncSlots]
        assert bodies(again) == []
        core.do(said(SyncReply(known=(slot,))), tokens(slot, 0, [5, 6, 7, 8]))
        assert core.delivered() == [5, 6, 7, 8]

    def test_a_second_gap_is_synced_again(self):
        core = Core()
        (slot,) = core.running()
        core.do(tokens(slot, 2, [7]), said(SyncReply(known=(slot,))), tokens(slot, 0, [5]))
        assert [type(body) for body in bodies(core.do(tokens(slot, 3, [8])))] == [SyncSlots]

    def test_a_finish_after_a_gap_waits_for_the_missing_tokens(self):
        core = Core()
        (slot,) = core.running()
        core.do(tokens(slot, 2, [7], finish=FinishReason.LENGTH))
        assert phase(core) is JournalPhase.RUNNING

    def test_tokens_of_another_workers_slot_are_dropped(self):
        core = Core()
        (slot,) = core.running()
        assert core.do(tokens(slot, 0, [5], worker=W2)) == [Counted("tokens_stale", 1)]

    def test_more_tokens_than_asked_for_are_not_taken(self):
        core = Core()
        (slot,) = core.running(max_tokens=2)
        core.do(tokens(slot, 0, [5, 6, 7, 8], finish=FinishReason.LENGTH))
        assert core.delivered() == [5, 6]

    def test_the_finish_comes_with_the_last_token_and_the_end_after_the_client(self):
        core = Core()
        (slot,) = core.running()
        effects = core.do(tokens(slot, 0, [5], finish=FinishReason.STOP))
        deliver = next(effect for effect in effects if isinstance(effect, Deliver))
        assert deliver.finish is not None
        assert phase(core) is JournalPhase.DRAINING_CLIENT
        effects = core.do(ClientDrained(R))
        assert bodies(effects) == [EndRequests(requests=(R,))]
        assert [e.entry.outcome for e in effects if isinstance(e, TellEnd)] == [Outcome.FINISHED]

    def test_a_replay_with_nothing_left_is_finished_by_a_finish_alone(self):
        core = Core()
        (slot,) = core.running()
        core.do(tokens(slot, 0, [5]))
        empty = StepTokens(
            slots=b"", first_index=b"", counts=b"", tokens=b"", finish=(Finish(slot=slot, reason=FinishReason.LENGTH),)
        )
        (deliver,) = (effect for effect in core.do(said(empty)) if isinstance(effect, Deliver))
        assert (deliver.first_index, len(deliver.tokens)) == (1, 0)
        assert phase(core) is JournalPhase.DRAINING_CLIENT

    def test_prompt_logprobs_come_before_any_token_and_only_once(self):
        core = Core()
        (slot,) = core.running()
        entry = TokenLogprobs(slot=slot, index=1, chosen=-1.0, prompt=True)
        body = StepTokens(slots=b"", first_index=b"", counts=b"", tokens=b"", logprobs=(entry,))
        first, second = core.do(said(body)), core.do(said(body))
        assert [effect.logprobs for effect in first if isinstance(effect, Deliver)] == [(entry,)]
        assert second == []

    def test_an_engines_error_ends_the_request_with_its_reason(self):
        core = Core()
        (slot,) = core.running()
        error = Reason(kind=ReasonKind.DEVICE_SICK, text="not a number")
        body = StepTokens(
            slots=b"",
            first_index=b"",
            counts=b"",
            tokens=b"",
            finish=(Finish(slot=slot, reason=FinishReason.ERROR, error=error),),
        )
        (failed,) = failures(core.do(said(body)))
        assert (failed.failure, failed.reason) == (Failure.ENGINE, error)

    def test_a_stop_string_frees_its_choice_and_leaves_the_others(self):
        core = Core()
        first, second = core.running(n=2)
        effects = core.do(ChoiceStopped(R, 0))
        (cancel,) = bodies(effects)
        assert isinstance(cancel, CancelSlots)
        assert cancel.slots == (first,)
        core.do(tokens(second, 0, [5], finish=FinishReason.LENGTH))
        assert phase(core) is JournalPhase.DRAINING_CLIENT

    def test_a_client_that_is_gone_frees_everything_at_once(self):
        core = Core()
        slots = core.running(n=2)
        effects = core.do(ClientGone(R))
        cancel, end = bodies(effects)
        assert isinstance(cancel, CancelSlots)
        assert list(cancel.slots) == slots
        assert isinstance(end, EndRequests)
        assert core.state.journals == {}
        assert core.state.slots == {}

    def test_the_deadline_ends_a_running_request(self):
        core = Core()
        core.do(LeaderOpened(), accepted(deadline=core.now + 5), routed(), WorkerUp(W1), admitted())
        core.now += 6
        assert [failed.failure for failed in failures(core.do(Tick()))] == [Failure.DEADLINE]

    def test_cached_tokens_may_be_told_later(self):
        core = Core()
        core.running()
        assert core.do(admitted(cached=16)) == [Started(R, 16)]

    def test_a_resumed_stream_ends_here(self):
        core = Core()
        core.running()
        (failed,) = failures(core.do(said(Superseded(request=R, attempt=Attempt(2)))))
        assert failed.failure is Failure.SUPERSEDED


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
        core = Core(JournalLimits(max_retries=1))
        core.running()
        core.do(closed())
        core.do(routed(attempt=2, worker=W2), WorkerUp(W2))
        (failed,) = failures(core.do(closed(W2)))
        assert failed.failure is Failure.RETRIES

    def test_planned_moves_cost_no_retry(self):
        core = Core(JournalLimits(max_retries=0))
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
        core = Core(JournalLimits(max_retries=0))
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


class TestStreams:
    def test_a_broken_stream_is_synced_not_replayed(self):
        core = Core()
        (slot,) = core.running()
        core.do(tokens(slot, 0, [5, 6]))
        assert core.do(WorkerBroken(W1, core.now)) == []
        assert phase(core) is JournalPhase.SYNCING
        (sync,) = bodies(core.do(WorkerUp(W1)))
        assert isinstance(sync, SyncSlots)
        assert [(cursor.slot, cursor.next_index) for cursor in sync.slots] == [(slot, 2)]
        core.do(said(SyncReply(known=(slot,))), tokens(slot, 2, [7]))
        assert core.delivered() == [5, 6, 7]
        assert core.state.journals[R].attempt == 1

    def test_what_the_worker_no_longer_knows_is_replayed(self):
        core = Core()
        first, second = core.running(n=2)
        core.do(WorkerBroken(W1, core.now), WorkerUp(W1))
        effects = core.do(said(SyncReply(known=(first,), unknown=(second,))))
        assert [ask.entry.attempt for ask in asks(effects)] == [2]
        assert [body.slots for body in bodies(effects) if isinstance(body, CancelSlots)] == [(first, second)]

    def test_a_worker_that_refuses_connections_is_left_at_once(self):
        core = Core()
        core.running()
        core.do(WorkerBroken(W1, core.now))
        (ask,) = asks(core.do(WorkerGone(W1, WHY)))
        assert ask.entry.cause is RouteCause.LOST
        assert ask.entry.exclude

    def test_a_worker_that_stays_away_is_left_when_its_silence_is_too_long(self):
        core = Core()
        core.running()
        core.do(WorkerBroken(W1, core.now))
        core.now += TIMINGS.session_silence - 0.01
        assert asks(core.do(Tick())) == []
        core.now += 0.02
        (ask,) = asks(core.do(Tick()))
        assert ask.entry.cause is RouteCause.UNREACHABLE

    def test_a_worker_silent_before_the_break_has_less_time(self):
        core = Core()
        core.running()
        core.do(WorkerBroken(W1, core.now - TIMINGS.session_silence))
        core.now += TIMINGS.heartbeat_interval + 0.01
        assert len(asks(core.do(Tick()))) == 1

    def test_a_body_that_waits_for_its_stream_goes_out_when_it_is_up(self):
        core = Core()
        core.do(LeaderOpened(), accepted(), routed(), WorkerBroken(W1, core.now))
        effects = core.do(WorkerUp(W1))
        assert [body.permit.attempt for body in opens(effects)] == [1]

    def test_a_worker_that_cannot_be_reached_for_the_body_is_left(self):
        core = Core()
        core.do(LeaderOpened(), accepted(), routed())
        core.now += TIMINGS.session_silence + 0.01
        assert [ask.entry.attempt for ask in asks(core.do(Tick()))] == [2]

    def test_a_sync_without_an_answer_ends_in_a_replay(self):
        core = Core()
        core.running()
        core.do(WorkerBroken(W1, core.now), WorkerUp(W1))
        core.now += TIMINGS.stage + 0.01
        assert [ask.entry.attempt for ask in asks(core.do(Tick()))] == [2]

    def test_an_end_that_could_not_be_told_is_told_later(self):
        core = Core()
        core.running()
        core.do(WorkerBroken(W1, core.now), ClientGone(R))
        assert bodies(core.do(WorkerUp(W1))) == [SyncSlots(), EndRequests(requests=(R,))]

    def test_a_stream_that_nobody_needs_is_dropped(self):
        core = Core()
        core.do(LeaderOpened(), LeaderSaid(ReplicaTable(full=True, rows=(row(),))), WorkerUp(W1))
        core.do(LeaderSaid(ReplicaTable(full=False, rows=(row(phase=ReplicaPhase.CLOSED),))))
        core.now += 1
        assert core.do(Tick()) == [DropWorker(W1)]


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
