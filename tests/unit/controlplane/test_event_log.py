"""The event log: a ring with followers, a file behind it, and a full disk that costs only events."""

from __future__ import annotations

import asyncio
from pathlib import Path

from controlplane.core.messages import Recorded
from controlplane.event_log import EventLog
from controlplane.runtime.clock import SystemClock
from controlplane.runtime.ids import NodeId, Term
from controlplane.runtime.messages.common import Reason, ReasonKind


async def collect(events: EventLog, last: int = 0) -> list[str]:
    return [event.name async for event in events.follow(last, False)]


async def test_events_are_kept_in_order_and_numbered(tmp_path: Path) -> None:
    events = EventLog(SystemClock(), tmp_path / "events.jsonl")
    for name in ("node_joined", "node_lost", "replica_closed"):
        events.record(Recorded(name, node=NodeId("w0")), Term(3))
    assert await collect(events) == ["node_joined", "node_lost", "replica_closed"]
    assert await collect(events, last=1) == ["replica_closed"]
    assert [event.seq async for event in events.follow(0, False)] == [1, 2, 3]


async def test_a_new_leader_tells_what_the_old_one_wrote(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    old = EventLog(SystemClock(), path)
    old.record(Recorded("node_lost", node=NodeId("w1"), reason=Reason(kind=ReasonKind.LEASE_EXPIRED)), Term(1))
    path.open("ab").write(b'{"seq": 2, "wall')  # a process died while it wrote
    new = EventLog(SystemClock(), path)
    new.load()
    new.record(Recorded("leader_elected"), Term(2))
    new.load()
    kept = [event async for event in new.follow(0, False)]
    assert [event.name for event in kept] == ["node_lost", "leader_elected"]
    assert kept[0].reason is not None
    assert kept[0].reason.kind is ReasonKind.LEASE_EXPIRED


async def test_a_follower_sees_what_happens_after_it_came() -> None:
    events = EventLog(SystemClock(), None)
    events.record(Recorded("node_joined"), Term(1))
    seen: list[str] = []

    async def follow() -> None:
        async for event in events.follow(0, True):
            seen.append(event.name)
            if len(seen) == 3:
                return

    follower = asyncio.create_task(follow())
    await asyncio.sleep(0)
    events.record(Recorded("node_lost"), Term(1))
    await asyncio.sleep(0)
    events.record(Recorded("node_left"), Term(1))
    await asyncio.wait_for(follower, 5)
    assert seen == ["node_joined", "node_lost", "node_left"]


async def test_a_disk_that_refuses_costs_events_only(tmp_path: Path) -> None:
    events = EventLog(SystemClock(), tmp_path / "missing" / "events.jsonl")
    events.record(Recorded("node_joined"), Term(1))
    assert events.dropped == 1
    assert await collect(events) == ["node_joined"]
