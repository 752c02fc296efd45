"""A process of the simulated world: a clock that may drift and jump, timers, and tasks; it may be stopped or killed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from tools.sim.kernel import Kernel, Timer


class Future:
    """A value that will be there."""

    __slots__ = ("_waiters", "done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None
        self._waiters: list[Callable[[], None]] = []

    def set(self, value: Any = None) -> None:
        if not self.done:
            self.done, self.value = True, value
            self._tell()

    def fail(self, error: Exception) -> None:
        if not self.done:
            self.done, self.error = True, error
            self._tell()

    def then(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` when the value is there."""
        if self.done:
            waiter()
        else:
            self._waiters.append(waiter)

    def _tell(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def __await__(self) -> Any:
        if not self.done:
            yield self
        if self.error is not None:
            raise self.error
        return self.value


class Signal:
    """Something that happens again and again. Look first, then wait."""

    def __init__(self) -> None:
        self._next = Future()

    def set(self) -> None:
        happened, self._next = self._next, Future()
        happened.set()

    def wait(self) -> Future:
        """Done the next time it happens."""
        return self._next


class Task(Future):
    """A coroutine of a process."""

    __slots__ = ("_coroutine", "_process")

    def __init__(self, process: Process, coroutine: Coroutine[Any, Any, Any]) -> None:
        super().__init__()
        self._process = process
        self._coroutine: Coroutine[Any, Any, Any] | None = coroutine
        process.soon(self._step)

    @property
    def over(self) -> bool:
        """It ended or was cancelled."""
        return self._coroutine is None

    def cancel(self) -> None:
        if self._coroutine is not None:
            self._coroutine.close()
            self._coroutine = None

    def die(self) -> None:
        """Its process was killed: one that waits will never go on, and one that had not begun never begins."""
        if self._coroutine is not None and inspect.getcoroutinestate(self._coroutine) == inspect.CORO_CREATED:
            self.cancel()

    def _step(self) -> None:
        if self._coroutine is None:
            return
        try:
            waits: Future = self._coroutine.send(None)
        except StopIteration as end:
            self._coroutine = None
            self.set(end.value)
            return
        waits.then(lambda: self._process.soon(self._step))


class Process:
    """One life of one program, from its start to its kill."""

    def __init__(self, kernel: Kernel, name: str, host: str, *, rate: float = 1.0) -> None:
        """`rate`: how fast its clock runs."""
        self.kernel = kernel
        self.name = name
        self.host = host
        self.alive = True
        # SIGSTOP, or its machine stands still: nothing runs, pings stay without an answer.
        self.stopped = False
        self.paused = False
        # Its loop is stuck while other threads answer pings.
        self.hung = False
        self._rate = rate
        self._born = kernel.now
        self._jumped = kernel.random.uniform(100.0, 10_000.0)
        self._backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._timers: dict[Timer, tuple[float, Callable[..., None], tuple[Any, ...]]] = {}
        self._tasks: list[Task] = []

    @property
    def runs(self) -> bool:
        return self.alive and not (self.stopped or self.hung or self.paused)

    @property
    def mute(self) -> bool:
        """It answers no pings."""
        return self.stopped or self.paused or not self.alive

    # ------------------------------------------------------------ time

    def now(self) -> float:
        """Its own monotonic clock."""
        return (self.kernel.now - self._born) * self._rate + self._jumped

    def wall_ms(self) -> int:
        return round(self.kernel.now * 1000)

    async def sleep(self, seconds: float) -> None:
        await self.timeout(seconds)

    def timeout(self, seconds: float) -> Future:
        """Done after `seconds` of its clock; never for an infinite time."""
        future = Future()
        if seconds != float("inf"):
            self.later(seconds, future.set)
        return future

    def later(self, seconds: float, action: Callable[..., None], *arguments: Any) -> Timer:
        deadline = self.now() + max(0.0, seconds)
        return self._arm(deadline, action, arguments)

    def jump(self, seconds: float) -> None:
        """Its clock leaps forward: what is due meanwhile is due at once."""
        self._jumped += seconds
        timers, self._timers = list(self._timers.items()), {}
        for timer, (deadline, action, arguments) in timers:
            if timer.action is not None:
                timer.cancel()
                self._arm(deadline, action, arguments)

    def _arm(self, deadline: float, action: Callable[..., None], arguments: tuple[Any, ...]) -> Timer:
        wait = max(0.0, deadline - self.now()) / self._rate
        timer = self.kernel.after(wait, self._due)
        timer.arguments = (timer,)
        self._timers[timer] = (deadline, action, arguments)
        return timer

    def _forget(self, timer: Timer) -> None:
        timer.cancel()
        self._timers.pop(timer, None)

    def _due(self, timer: Timer) -> None:
        held = self._timers.pop(timer, None)
        if held is not None:
            _, action, arguments = held
            self.run(action, *arguments)

    # ------------------------------------------------------------ running

    def soon(self, action: Callable[..., None], *arguments: Any) -> None:
        self.kernel.at(self.kernel.now, self.run, action, *arguments)

    def run(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do it now; when it runs again if it is stopped; never if it is dead."""
        if not self.alive:
            return
        if not self.runs:
            self._backlog.append((action, arguments))
        else:
            action(*arguments)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> Task:
        task = Task(self, coroutine)
        self._tasks = [other for other in self._tasks if not other.over]
        self._tasks.append(task)
        if not self.alive:
            task.die()
        return task

    def cancel_tasks(self) -> None:
        """End whatever runs: the process is on its way out."""
        for task in self._tasks:
            task.cancel()

    def first(self, *futures: Future, timeout: float = float("inf")) -> Future:
        """The index of the first of `futures` that is done; -1 after `timeout` seconds."""
        winner = Future()
        for index, future in enumerate(futures):
            future.then(lambda index=index: winner.set(index))
        if timeout != float("inf") and not winner.done:
            timer = self.later(timeout, winner.set, -1)
            winner.then(lambda: self._forget(timer))
        return winner

    def stop(self, *, hung: bool = False) -> None:
        if self.alive and not self.stopped:
            self.hung, self.stopped = hung, not hung

    def go_on(self) -> None:
        """End a stop. A machine that stands still runs nothing, whatever ends meanwhile."""
        self.stopped = self.hung = False
        self._catch_up()

    def pause(self) -> None:
        self.paused = True

    def unpause(self) -> None:
        self.paused = False
        self._catch_up()

    def _catch_up(self) -> None:
        """If it runs again: what came meanwhile is handled now, timers and news in either order."""
        if not self.runs:
            return
        backlog, self._backlog = self._backlog, []
        if self.kernel.random.random() < 0.5:
            backlog.sort(key=lambda item: item[0].__name__ != "deliver")
        for action, arguments in backlog:
            self.soon(action, *arguments)

    def kill(self) -> None:
        self.alive = False
        self._backlog.clear()
        self._timers.clear()
        for task in self._tasks:
            task.die()
