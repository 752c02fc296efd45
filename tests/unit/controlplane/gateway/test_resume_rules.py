"""Streams taken over: the search among the workers, and the journal that goes on where its client is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.gateway.messages import (
    ChoiceSeen,
    ChoiceStopped,
    ClientDrained,
    ConnectWorker,
    DropWorker,
    Effect,
    Event,
    Failure,
    LeaderLost,
    LeaderOpened,
    LeaderSaid,
    ResumeAsked,
    ResumeDropped,
    ShadowFound,
    StreamAdopted,
    TellJournal,
    Tick,
    WorkerGone,
    WorkerKey,
    WorkerUp,
)
from controlplane.runtime.ids import Attempt, Epoch, NodeId, ReplicaId, Slot, Term
from controlplane.runtime.messages.common import Permit, Sampling
from controlplane.runtime.messages.route import JournalPhase, LeaderHeartbeat, ReplicaTable, WorkerRow
from controlplane.runtime.messages.serve import (
    Choice,
    EndRequests,
    FinishReason,
    ResumeRequest,
    Shadow,
    SlotsLost,
    SyncReply,
    SyncSlots,
)
from controlplane.runtime.packing import pack_u32
from tests.unit.controlplane.gateway.builders import (
    W1,
    W2,
    WHY,
    Core,
    R,
    accepted,
    asks,
    bodies,
    failures,
    phase,
    row,
    said,
    tokens,
)

MISSING = Shadow(request=R, attempt=Attempt(0), prompt=b"", sampling=Sampling(), render=b"", missing=True)


def shadow(attempt: int = 2, *choices: int, worker: str = W1) -> tuple[Shadow, ...]:
    """The chunks of a worker that holds so many tokens of each choice."""
    permit = Permit(request=R, attempt=Attempt(attempt), replica=ReplicaId(f"r-{worker}"), epoch=Epoch(1), term=Term(1))
    body = Shadow(
        request=R, attempt=Attempt(attempt), prompt=pack_u32([1]), sampling=Sampling(), render=b"", last=False
    )
    parts = [
        Choice(index=index, slot=Slot(0), seed=index, delivered=pack_u32(range(count)))
        for index, count in enumerate(choices or (5,))
    ]
    chunks = [replace(body, prompt=b"", choices=(part,)) for part in parts]
    return (replace(body, permit=permit), *chunks[:-1], replace(chunks[-1], last=True))


def gateway() -> Core:
    """A gateway with streams to W1 and W2, and a leader."""
    core = Core()
    table = LeaderSaid(ReplicaTable(full=True, rows=(row(W1), row(W2))))
    core.do(LeaderOpened(), table, LeaderSaid(LeaderHeartbeat()), WorkerUp(W1), WorkerUp(W2))
    return core


def found(effects: list[Effect]) -> list[ShadowFound]:
    return [effect for effect in effects if isinstance(effect, ShadowFound)]


def adopt(core: Core, *seen: ChoiceSeen, held: tuple[int, ...] = (5,)) -> list[Effect]:
    core.do(ResumeAsked(R), said(MISSING, W2))
    effects: list[Effect] = []
    for chunk in shadow(2, *held):
        effects += core.do(said(chunk, W1))
    (answer,) = found(effects)
    assert answer.shadow is not None
    asked = accepted(n=len(held), max_tokens=20)
    return core.do(StreamAdopted(asked, answer.worker, answer.node, answer.shadow, seen))


class TestSearch:
    def test_all_workers_are_asked_and_the_newest_shadow_wins(self):
        core = gateway()
        assert bodies(core.do(ResumeAsked(R))) == [ResumeRequest(request=R)] * 2
        for chunk in shadow(3, worker=W2):
            assert not found(core.do(said(chunk, W2))), "W1 has not answered"
        effects: list[Effect] = []
        for chunk in shadow(2):
            effects += core.do(said(chunk, W1))
        (answer,) = found(effects)
        assert (answer.worker, answer.shadow and answer.shadow.attempt) == (W2, 3)
        assert bodies(effects) == [EndRequests(requests=(R,))], "the older one is freed"

    def test_who_answered_is_not_dropped_before_the_others_did(self):
        """Its replica is gone from the table meanwhile, so that nothing else needs its stream."""
        core = gateway()
        core.do(ResumeAsked(R))
        for chunk in shadow(3, worker=W2):
            core.do(said(chunk, W2))
        core.do(LeaderSaid(ReplicaTable(full=True, rows=(row(W1),))), Tick())
        (answer,) = found(core.do(said(MISSING, W1)))
        assert (answer.worker, answer.shadow and answer.shadow.attempt) == (W2, 3)
        core.now += 1.0
        assert DropWorker(W2) in core.do(Tick())

    def test_a_worker_without_a_replica_is_asked_too(self):
        """Its replica has moved on; what ran there may be resumed."""
        core = gateway()
        idle = WorkerRow(node=NodeId("w3"), serve_address="w3:1")
        core.do(LeaderSaid(ReplicaTable(full=False, workers=(idle,))))
        effects = core.do(ResumeAsked(R))
        assert ConnectWorker(WorkerKey("w3:1"), NodeId("w3")) in effects
        assert not found(core.do(said(MISSING, W1), said(MISSING, W2))), "w3 has not answered"
        assert ResumeRequest(request=R) in bodies(core.do(WorkerUp(WorkerKey("w3:1"))))
        (answer,) = found(core.do(said(MISSING, WorkerKey("w3:1"))))
        assert answer.certain
        core.do(LeaderSaid(ReplicaTable(full=False, workers=(replace(idle, gone=True),))))
        assert not core.state.told

    def test_a_shadow_comes_in_one_piece(self):
        core = gateway()
        core.do(ResumeAsked(R), said(MISSING, W2))
        effects: list[Effect] = []
        for chunk in shadow(2, 5, 3):
            effects += core.do(said(chunk, W1))
        (answer,) = found(effects)
        assert answer.shadow is not None
        assert [len(choice.delivered) // 4 for choice in answer.shadow.choices] == [5, 3]
        assert answer.shadow.prompt == pack_u32([1])
        assert answer.shadow.permit is not None

    def test_none_holds_it(self):
        core = gateway()
        core.do(ResumeAsked(R), said(MISSING, W1))
        (answer,) = found(core.do(said(MISSING, W2)))
        assert answer.shadow is None
        assert answer.certain

    def test_without_a_leader_others_may_hold_it(self):
        """A gateway that just woke up may have missed that workers came."""
        core = gateway()
        core.do(LeaderLost(), ResumeAsked(R), said(MISSING, W1))
        (answer,) = found(core.do(said(MISSING, W2)))
        assert (answer.shadow, answer.certain) == (None, False)

    @pytest.mark.parametrize(
        "said_last",
        [
            LeaderOpened(Term(2)),
            LeaderSaid(LeaderHeartbeat(frozen=True)),
            LeaderSaid(LeaderHeartbeat(workers_unheard=True)),
        ],
    )
    def test_a_leader_that_may_not_have_heard_of_all_leaves_it_uncertain(self, said_last: Event):
        """A worker that is cut off from etcd may come to a new leader last of all."""
        core = gateway()
        core.do(said_last, ResumeAsked(R), said(MISSING, W1))
        (answer,) = found(core.do(said(MISSING, W2)))
        assert (answer.shadow, answer.certain) == (None, False)
        core.do(LeaderSaid(LeaderHeartbeat()), ResumeAsked(R), said(MISSING, W1))
        (answer,) = found(core.do(said(MISSING, W2)))
        assert answer.certain

    def test_what_a_leader_said_long_ago_leaves_it_uncertain(self):
        """The gateway stood still meanwhile, and hears its leader's silence last."""
        core = gateway()
        core.now += core.state.timings.session_silence
        core.do(ResumeAsked(R), said(MISSING, W1))
        (answer,) = found(core.do(said(MISSING, W2)))
        assert (answer.shadow, answer.certain) == (None, False)

    def test_streams_are_kept_to_workers_that_a_new_leader_may_not_have_heard_of(self):
        core = gateway()
        core.do(LeaderOpened(Term(2)), LeaderSaid(ReplicaTable(full=True, rows=(row(W1),))))
        assert not core.do(Tick())
        core.now += core.state.timings.heartbeat_interval
        assert core.do(LeaderSaid(LeaderHeartbeat()), Tick()) == [DropWorker(W2)]

    def test_a_worker_that_does_not_answer_leaves_it_uncertain(self):
        core = gateway()
        core.do(ResumeAsked(R), said(MISSING, W1))
        core.now += core.state.timings.session_silence
        (answer,) = found(core.do(Tick()))
        assert (answer.shadow, answer.certain) == (None, False)
        assert W2 in answer.reason.text

    def test_a_worker_that_is_gone_is_not_waited_for(self):
        core = gateway()
        core.do(ResumeAsked(R), said(MISSING, W1))
        core.state.workers[W2].phase = core.state.workers[W2].phase.BROKEN
        (answer,) = found(core.do(WorkerGone(W2, WHY)))
        assert answer.certain

    def test_a_worker_that_only_this_gateway_cannot_reach_may_hold_it(self):
        """The leader counts it among the living."""
        core = gateway()
        core.do(LeaderSaid(ReplicaTable(full=False, workers=(WorkerRow(node=NodeId("w2"), serve_address=W2),))))
        core.do(ResumeAsked(R), said(MISSING, W1))
        core.state.workers[W2].phase = core.state.workers[W2].phase.BROKEN
        (answer,) = found(core.do(WorkerGone(W2, WHY)))
        assert (answer.shadow, answer.certain) == (None, False)
        assert W2 in answer.reason.text

    def test_a_worker_that_could_be_reached_in_the_end_counts(self):
        core = gateway()
        core.do(LeaderSaid(ReplicaTable(full=False, workers=(WorkerRow(node=NodeId("w2"), serve_address=W2),))))
        core.do(ResumeAsked(R))
        core.state.workers[W2].phase = core.state.workers[W2].phase.BROKEN
        core.do(WorkerGone(W2, WHY), WorkerUp(W2), said(MISSING, W1))
        effects = [effect for chunk in shadow(2, worker=W2) for effect in core.do(said(chunk, W2))]
        (answer,) = found(effects)
        assert answer.worker == W2

    def test_a_worker_that_comes_up_meanwhile_is_asked_too(self):
        core = Core()
        core.do(LeaderOpened(), LeaderSaid(ReplicaTable(full=True, rows=(row(W1),))), ResumeAsked(R))
        assert ResumeRequest(request=R) in bodies(core.do(WorkerUp(W1)))

    def test_a_gateway_without_workers_says_so(self):
        core = Core()
        core.do(ResumeAsked(R))
        core.now += core.state.timings.session_silence
        (answer,) = found(core.do(Tick()))
        assert not answer.certain

    def test_a_client_that_went_away_ends_the_search(self):
        core = gateway()
        core.do(ResumeAsked(R), ResumeDropped(R))
        assert not core.state.searches
        for chunk in shadow(2):
            assert not core.do(said(chunk, W1)), "the worker keeps it"


class TestAdoption:
    def test_it_goes_on_where_the_client_is(self):
        core = gateway()
        effects = adopt(core, ChoiceSeen(3, finished=False))
        (sync,) = bodies(effects)
        assert isinstance(sync, SyncSlots)
        (cursor,) = sync.slots
        assert (cursor.attempt, cursor.next_index) == (2, 3)
        assert phase(core) == JournalPhase.SYNCING
        core.do(said(SyncReply(known=(cursor.slot,)), W1))
        assert phase(core) == JournalPhase.RUNNING
        core.do(tokens(cursor.slot, 3, [3, 4, 5], finish=FinishReason.LENGTH))
        assert phase(core) == JournalPhase.DRAINING_CLIENT
        assert bodies(core.do(ClientDrained(R))) == [EndRequests(requests=(R,))]

    def test_the_leader_is_told(self):
        core = gateway()
        (told,) = [effect for effect in adopt(core, ChoiceSeen(3, finished=False)) if isinstance(effect, TellJournal)]
        assert (told.info.phase, told.info.replica, told.info.entry.delivered_tokens) == (
            JournalPhase.SYNCING,
            "r-w1:1",
            3,
        )

    def test_it_works_without_a_leader(self):
        core = gateway()
        core.do(LeaderLost())
        assert not [effect for effect in adopt(core, ChoiceSeen(3, finished=False)) if isinstance(effect, TellJournal)]

    def test_a_choice_whose_end_was_told_stays_ended(self):
        core = gateway()
        (sync,) = bodies(adopt(core, ChoiceSeen(5, finished=True), ChoiceSeen(0, finished=False), held=(5, 2)))
        assert isinstance(sync, SyncSlots)
        assert [(cursor.choice, cursor.next_index) for cursor in sync.slots] == [(1, 0)]

    def test_a_stream_told_to_its_end_only_waits_for_its_client(self):
        core = gateway()
        assert not bodies(adopt(core, ChoiceSeen(5, finished=True)))
        assert bodies(core.do(ClientDrained(R))) == [EndRequests(requests=(R,))]

    def test_a_lost_sequence_is_replayed_under_the_next_attempt(self):
        core = gateway()
        adopt(core, ChoiceSeen(3, finished=False))
        (slot,) = core.slots()
        (ask,) = asks(core.do(said(SlotsLost(slots=(slot,), reason=WHY), W1)))
        assert (ask.entry.attempt, ask.entry.delivered_tokens) == (3, 3)

    def test_a_choice_that_the_former_gateway_had_moved_is_replayed(self):
        core = gateway()
        adopt(core, ChoiceSeen(3, finished=False))
        (slot,) = core.slots()
        effects = core.do(tokens(slot, 3, [3, 4], finish=FinishReason.CANCELLED))
        (ask,) = asks(effects)
        assert (ask.entry.attempt, ask.entry.delivered_tokens, ask.entry.exclude) == (3, 5, ())
        assert core.state.journals[R].retries == 0

    def test_a_choice_that_had_met_its_stop_string_only_ends(self):
        core = gateway()
        adopt(core, ChoiceSeen(3, finished=False))
        (slot,) = core.slots()
        core.do(tokens(slot, 3, [3, 4], finish=FinishReason.CANCELLED), ChoiceStopped(R, 0))
        assert phase(core) == JournalPhase.DRAINING_CLIENT
        core.do(ClientDrained(R))
        assert R not in core.state.journals

    def test_an_own_stream_is_taken_over_from_its_former_client(self):
        core = gateway()
        core.running()
        effects = core.do(ResumeAsked(R))
        (failed,) = failures(effects)
        assert failed.failure == Failure.SUPERSEDED
        assert bodies(effects) == [ResumeRequest(request=R)] * 2, "nothing is cancelled"
        assert R not in core.state.journals

    def test_an_own_stream_between_two_replicas_is_worth_asking_again(self):
        core = gateway()
        core.do(accepted())
        (answer,) = found(core.do(ResumeAsked(R)))
        assert (answer.shadow, answer.certain) == (None, False)
        assert R in core.state.journals
