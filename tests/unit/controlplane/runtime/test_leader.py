"""Hints about the leader from frames, while etcd is away."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from controlplane.runtime.clock import SystemClock
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.ids import Incarnation, Term
from controlplane.runtime.keys import Keys
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.timing import derive_timings


@pytest.fixture
async def leader() -> LeaderWatch:
    """Never connected to etcd."""
    clock, timings = SystemClock(), derive_timings()
    client = EtcdClient(EtcdOptions(endpoints=("127.0.0.1:1",)), timings, clock)
    return LeaderWatch(client, Keys("test"), timings, clock, Random(0))


async def changes(leader: LeaderWatch, address: str, term: int) -> bool:
    """True if the hint wakes whoever waits."""
    waiting = asyncio.create_task(leader.changed())
    await asyncio.sleep(0)
    leader.hint(address, Term(term))
    await asyncio.sleep(0)
    waiting.cancel()
    return waiting.done()


async def test_nothing_is_known_at_first(leader: LeaderWatch) -> None:
    assert (leader.current, leader.highest_term, leader.addresses) == (None, 0, ())


async def test_a_hint_gives_an_address_and_the_highest_wins(leader: LeaderWatch) -> None:
    assert await changes(leader, "a:1", 3)
    assert leader.addresses == ("a:1",)
    assert await changes(leader, "b:1", 5)
    assert not await changes(leader, "c:1", 4)
    assert not await changes(leader, "d:1", 5)
    assert leader.addresses == ("b:1",)
    assert leader.highest_term == 5


async def test_a_term_without_an_address_is_remembered(leader: LeaderWatch) -> None:
    leader.hint("a:1", Term(3))
    assert await changes(leader, "", 9)
    assert not await changes(leader, "", 9)
    assert leader.highest_term == 9
    assert leader.addresses == ("a:1",)


async def test_a_term_that_two_lead_is_good_for_nobody(leader: LeaderWatch) -> None:
    """etcd was restored to before the first of them, and nobody who stood for election knew of him."""
    one, other = Incarnation("1" * 32), Incarnation("2" * 32)
    leader.meet(Term(2), one)
    leader.meet(Term(2), one)
    assert leader.highest_term == 0
    leader.meet(Term(2), other)
    assert leader.highest_term == 3
    leader.meet(Term(4), other)
    assert leader.highest_term == 3
