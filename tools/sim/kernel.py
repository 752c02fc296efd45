"""Virtual time: one heap of what is due, one source of chance, one story of what happened."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

from tools.sim.story import Story


class Timer:
    """Something due. `cancel` makes it nothing."""

    __slots__ = ("action", "arguments", "when")

    def __init__(self, when: float, action: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
        self.when = when
        self.action = action
        self.arguments = arguments

    def cancel(self) -> None:
        self.action = None


class Kernel:
    """Runs what is due, in the order of time and then of asking."""

    def __init__(self, seed: int, story: Story) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.story = story
        self.steps = 0
        # Hears the name of every event of the story.
        self.on_told: Callable[[str], None] = _nothing
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = 0

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> Timer:
        """Call `action` at `when`, or now if that is past."""
        self._order += 1
        timer = Timer(max(when, self.now), action, arguments)
        heapq.heappush(self._heap, (timer.when, self._order, timer))
        return timer

    def after(self, delay: float, action: Callable[..., None], *arguments: Any) -> Timer:
        return self.at(self.now + delay, action, *arguments)

    def run_until(self, end: float) -> None:
        """Let time pass up to `end`."""
        while self.run_next(end):
            pass
        self.now = max(self.now, end)

    def run_next(self, until: float) -> bool:
        """Do the next thing that is due at `until` or before. False: nothing is."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            when, _, timer = heapq.heappop(heap)
            if timer.action is not None:
                self.now = max(self.now, when)
                self.steps += 1
                timer.action(*timer.arguments)
                return True
        return False

    def tell(self, who: str, what: str, **about: object) -> None:
        """One line of the story."""
        self.story.tell(self.now, who, what, about)
        self.on_told(what)


def _nothing(event: str) -> None:
    pass
