"""Waiting for whichever comes first, without losing a cancellation on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def race(*contenders: Coroutine[Any, Any, object]) -> None:
    """Return when the first contender ends, the others cancelled and over. An exception of one that ended is raised."""
    tasks = [asyncio.ensure_future(contender) for contender in contenders]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def within(seconds: float, wait: Awaitable[T]) -> T:
    """The result of `wait`. Raises TimeoutError after `seconds`.

    In place of asyncio.wait_for, which before Python 3.12 loses a cancellation that comes together with the result.
    """
    async with asyncio.timeout(seconds):
        return await wait
