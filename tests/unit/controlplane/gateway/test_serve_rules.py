"""The request's state table, row by row: tokens, finishes, and streams that break."""

from __future__ import annotations

from controlplane.gateway.messages import (
    ChoiceStopped,
    ClientDrained,
    ClientGone,
    Counted,
    Deliver,
    DropWorker,
    Failure,
    LeaderOpened,
    LeaderSaid,
    Started,
    TellEnd,
    Tick,
    WorkerBroken,
    WorkerGone,
    WorkerUp,
)
from controlplane.runtime.ids import Attempt
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import (
    JournalPhase,
    LeaderHeartbeat,
    Outcome,
    ReplicaTable,
    RouteCause,
)
from controlplane.runtime.messages.serve import (
    CancelSlots,
    EndRequests,
    Finish,
    FinishReason,
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
    bodies,
    failures,
    opens,
    phase,
    routed,
    row,
    said,
    tokens,
)


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
        core.do(
            LeaderSaid(ReplicaTable(full=False, rows=(row(phase=ReplicaPhase.CLOSED),))), LeaderSaid(LeaderHeartbeat())
        )
        core.now += 1
        assert core.do(Tick()) == [DropWorker(W1)]
