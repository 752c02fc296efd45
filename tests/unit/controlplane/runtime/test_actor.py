"""Mailboxes say what happens when they are full; supervision has a budget."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.runtime.actor import Mailbox, MailboxFull, TaskReturned, eternal, supervise
from controlplane.runtime.clock import SystemClock


class SteppedClock(SystemClock):
    """Time that passes only in sleeps, which it notes."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


async def test_items_come_out_in_their_order() -> None:
    box: Mailbox[int] = Mailbox("box", 3)
    for item in (1, 2, 3):
        await box.put(item)
    assert [await box.get() for _ in range(3)] == [1, 2, 3]


async def test_get_waits_for_an_item() -> None:
    box: Mailbox[int] = Mailbox("box", 1)
    getting = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    assert not getting.done()
    box.offer(7)
    assert await getting == 7


async def test_put_waits_while_full_and_keeps_the_bound() -> None:
    box: Mailbox[int] = Mailbox("box", 2)
    putting = [asyncio.create_task(box.put(item)) for item in range(5)]
    taken = []
    while len(taken) < 5:
        await asyncio.sleep(0)
        assert len(box) <= 2
        taken.append(await box.get())
    assert sorted(taken) == [0, 1, 2, 3, 4]
    await asyncio.gather(*putting)


async def test_a_cancelled_put_leaves_nothing_behind() -> None:
    box: Mailbox[int] = Mailbox("box", 1)
    box.offer(1)
    putting = asyncio.create_task(box.put(2))
    await asyncio.sleep(0)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert box.drain(9) == [1]


async def test_offer_refuses_when_full_and_counts() -> None:
    box: Mailbox[int] = Mailbox("inbox of x", 1)
    box.offer(1)
    with pytest.raises(MailboxFull, match="inbox of x"):
        box.offer(2)
    assert box.dropped == 1
    assert box.drain(9) == [1]


async def test_the_latest_of_a_key_replaces_the_unread_one_in_its_place() -> None:
    box: Mailbox[str] = Mailbox("box", 1)
    box.put_latest("load", "load 1")
    box.put_latest("health", "health 1")
    box.put_latest("load", "load 2")
    # Bounded by its keys, not by the capacity: it never waits and never refuses.
    assert len(box) == 2
    assert box.dropped == 1
    assert await box.get() == "load 2"
    box.put_latest("load", "load 3")
    assert box.drain(9) == ["health 1", "load 3"]


async def test_drain_takes_what_is_there_up_to_the_limit() -> None:
    box: Mailbox[int] = Mailbox("box", 5)
    for item in range(4):
        box.offer(item)
    assert box.drain(3) == [0, 1, 2]
    assert box.drain(3) == [3]
    assert box.drain(3) == []


@given(st.lists(st.one_of(st.just("get"), st.integers(0, 3), st.tuples(st.integers(0, 1), st.integers())), max_size=40))
def test_a_mailbox_is_an_ordered_queue_with_one_slot_a_key(actions: list[object]) -> None:
    box: Mailbox[object] = Mailbox("box", 100)
    model: list[tuple[object, object]] = []
    for number, action in enumerate(actions):
        match action:
            case "get":
                expected = [model.pop(0)[1]] if model else []
                assert box.drain(1) == expected
            case (key, value):
                box.put_latest(key, value)
                place = next((index for index, (held, _) in enumerate(model) if held == ("key", key)), None)
                if place is None:
                    model.append((("key", key), value))
                else:
                    model[place] = (("key", key), value)
            case item:
                box.offer(item)
                model.append((number, item))
        assert len(box) == len(model)
    assert box.drain(100) == [item for _, item in model]


async def test_an_eternal_task_that_returns_is_an_error() -> None:
    async def short() -> None:
        return

    with pytest.raises(TaskReturned, match="short"):
        await eternal("short", short)


async def test_failures_within_the_budget_are_restarted_with_growing_waits() -> None:
    clock, runs, running = SteppedClock(), 0, asyncio.Event()

    async def flaky() -> None:
        nonlocal runs
        runs += 1
        if runs <= 3:
            raise OSError(f"failure {runs}")
        running.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(supervise("flaky", flaky, clock))
    await running.wait()
    assert not task.done()
    assert len(clock.slept) == 3
    for wait, base in zip(clock.slept, (0.1, 0.2, 0.4), strict=True):
        assert 0.8 * base <= wait <= 1.2 * base
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_budget_spent_the_last_failure_passes_through() -> None:
    clock, runs = SteppedClock(), 0

    async def broken() -> None:
        nonlocal runs
        runs += 1
        raise OSError(f"failure {runs}")

    with pytest.raises(OSError, match="failure 4"):
        await supervise("broken", broken, clock, restarts_max=3)


async def test_failures_of_an_earlier_window_are_forgotten() -> None:
    clock, runs = SteppedClock(), 0

    async def rare() -> None:
        nonlocal runs
        runs += 1
        if runs > 4:
            raise KeyError("enough")
        await clock.sleep(61.0)
        raise OSError("once a minute")

    with pytest.raises(KeyError, match="enough"):
        await supervise("rare", rare, clock, restarts_max=1, window_s=60.0)
    assert runs == 5


async def test_cancelling_is_no_failure() -> None:
    clock = SteppedClock()
    task = asyncio.create_task(supervise("idle", asyncio.Event().wait, clock))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.slept == []


async def test_nobody_waits_for_room_in_a_mailbox_that_is_closed() -> None:
    box: Mailbox[int] = Mailbox("box", 1)
    box.offer(1)
    waiting = asyncio.create_task(box.put(2))
    await asyncio.sleep(0)
    box.close()
    await waiting
    await box.put(3)
    box.put_latest("key", 4)
    assert (len(box), box.dropped) == (0, 4)
