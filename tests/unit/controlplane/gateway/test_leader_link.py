"""What came in one turn of the loop leaves as few frames, in order."""

from __future__ import annotations

from controlplane.gateway.journal import new_journal
from controlplane.gateway.leader_link import BATCH_MAX, batched
from controlplane.gateway.outbox import Outbox
from controlplane.runtime.ids import Attempt, RequestId
from controlplane.runtime.messages.route import EndBatch, EndEntry, GatewayHeartbeat, Outcome, RouteBatch
from tests.unit.controlplane.gateway.builders import accepted

ASK = new_journal(accepted(), 0.0).entry(0.0)
END = EndEntry(request=RequestId("a" * 32), attempt=Attempt(1), outcome=Outcome.FINISHED, tokens=1)
BEAT = GatewayHeartbeat(open_requests=0, journal_tokens=0, loop_lag_ms=0)


def test_neighbours_of_one_kind_travel_together_and_nobody_overtakes():
    frames = batched([ASK, ASK, END, BEAT, END, END, ASK])
    assert [type(frame) for frame in frames] == [RouteBatch, EndBatch, GatewayHeartbeat, EndBatch, RouteBatch]
    assert [len(frame.entries) for frame in frames if isinstance(frame, EndBatch)] == [1, 2]


def test_a_frame_is_bounded():
    frames = batched([ASK] * (BATCH_MAX + 1))
    assert [len(frame.entries) for frame in frames if isinstance(frame, RouteBatch)] == [BATCH_MAX, 1]


async def test_an_outbox_gives_all_it_has_and_is_idle_when_its_reader_is_back():
    outbox: Outbox[int] = Outbox("test", 2)
    outbox.put(1)
    outbox.put(2)
    assert not outbox.idle
    assert await outbox.take_all() == [1, 2]
    assert not outbox.idle


def test_an_outbox_that_is_full_says_so():
    outbox: Outbox[int] = Outbox("test", 1)
    outbox.put(1)
    assert not outbox.overflowed
    outbox.put(2)
    assert outbox.overflowed
