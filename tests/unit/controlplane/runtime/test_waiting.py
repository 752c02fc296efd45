"""Backoff between attempts, and waiting for whichever comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from random import Random
from typing import Any

import pytest

from controlplane.runtime.backoff import Backoff
from controlplane.runtime.race import race, within
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


async def test_within_gives_the_result_or_raises_in_time() -> None:
    assert await within(10, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(TimeoutError):
        await within(0, asyncio.Event().wait())


@pytest.mark.parametrize("how", [within, lambda seconds, wait: race(asyncio.sleep(seconds), _held(wait))])
async def test_a_cancellation_that_meets_the_result_is_not_lost(how: Callable[..., Coroutine[Any, Any, Any]]) -> None:
    result = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(how(10, result))
    for _ in range(3):
        await asyncio.sleep(0)
    result.set_result(None)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def _held(wait: Awaitable[None]) -> None:
    await wait
