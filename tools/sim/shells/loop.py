"""An asyncio loop in virtual time: when nothing is ready, the next thing that is due happens at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

from tools.sim.kernel import Kernel


class Life:
    """One life of one process on this loop, from its start to its kill."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True


WORLD = Life("world")
LIFE: ContextVar[Life] = ContextVar("life", default=WORLD)
"""Whose task runs: tasks inherit it from whoever made them."""


class LifeTask(asyncio.Task[Any]):
    """A task that knows whose it is. Numbered, so that sets of tasks have the same order in every run."""

    def __init__(self, number: int, coroutine: Coroutine[Any, Any, Any], loop: VirtualLoop, **options: Any) -> None:
        self.number = number
        self.life = LIFE.get()
        super().__init__(coroutine, loop=loop, **options)

    def __hash__(self) -> int:
        return self.number


class Stuck(AssertionError):
    """Nothing is due any more, and somebody still waits."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Its time is the kernel's. `on_idle` is called whenever every task waits."""

    def __init__(self, kernel: Kernel, on_idle: Callable[[], None]) -> None:
        super().__init__()
        self.kernel = kernel
        self.tasks: set[LifeTask] = set()
        # True: the port refuses a raw connect.
        self.refuses: Callable[[str, int], bool] = lambda host, port: False
        self._numbers = itertools.count()
        self._on_idle = on_idle
        # What asyncio's own loops have; BaseEventLoop asks it for news of files, of which there are none.
        self._selector = _Selector(self._wait)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self.kernel.now

    def _wait(self, timeout: float | None) -> list[Any]:
        """Until a timer is due: the loop's (after `timeout` seconds; None: there is none), or the world's."""
        if timeout is not None and timeout <= 0:
            return []
        self._on_idle()
        until = float("inf") if timeout is None else self.kernel.now + timeout
        if not self.kernel.run_next(until):
            if timeout is None:
                raise Stuck("nothing is due")
            self.kernel.now = until
        return []

    def _make_task(self, loop: Any, coroutine: Any, **options: Any) -> LifeTask:
        task = LifeTask(next(self._numbers), coroutine, self, **options)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    # ------------------------------------------------------------ what BaseEventLoop leaves open

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Only threads need to wake the loop; there are none."""

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        return [(2, 1, 6, "", (host, port))]

    async def sock_connect(self, sock: Any, address: Any) -> None:
        """A raw connect, which proves a death if it is refused."""
        await asyncio.sleep(0)
        host, port = address
        if self.refuses(host, port):
            raise ConnectionRefusedError(f"{host}:{port}")


class _Selector:
    def __init__(self, wait: Callable[[float | None], list[Any]]) -> None:
        self.select = wait


class VirtualClock:
    """The shells' clock."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def now(self) -> float:
        return self._kernel.now

    def wall_ms(self) -> int:
        return round(self._kernel.now * 1000)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
