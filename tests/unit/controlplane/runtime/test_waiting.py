"""Backoff between attempts, and waiting for whichever comes first."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from controlplane.runtime.backoff import Backoff
from controlplane.runtime.race import race
from controlplane.runtime.timing import derive_timings


def test_waits_double_up_to_a_heartbeat_and_start_over() -> None:
    backoff = Backoff(derive_timings(), Random(1))
    for base in (0.05, 0.1, 0.2, 0.4, 0.5, 0.5):
        assert 0.8 * base <= backoff.next() <= 1.2 * base
    backoff.reset()
    assert backoff.next() <= 1.2 * 0.05


def test_two_processes_do_not_wait_in_step() -> None:
    waits = [Backoff(derive_timings(), Random(seed)).next() for seed in range(20)]
    assert len(set(waits)) == 20


async def test_the_first_ends_the_race_and_the_others_are_over() -> None:
    cleaned = []

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append("slow")

    await race(slow(), asyncio.sleep(0))
    assert cleaned == ["slow"]


async def test_an_exception_ends_the_race_and_is_raised() -> None:
    async def broken() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        await race(asyncio.Event().wait(), broken())


async def test_cancelling_the_race_cancels_all() -> None:
    ended = []

    async def runner(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    racing = asyncio.create_task(race(runner("a"), runner("b")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing
    assert sorted(ended) == ["a", "b"]
