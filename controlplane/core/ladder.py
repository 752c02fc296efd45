"""Replicas of a deployment by how full they are, the emptiest first: a heap whose stale entries are passed over (as in
Python's own heapq recipes), so that the next replica is found by the logarithm of their number."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

STALE_FACTOR = 4
STALE_MIN = 64
"""A heap with more entries than that a replica is made anew."""


class Ladder:
    """Indices of replicas, each on the rung that it was put on last."""

    def __init__(self) -> None:
        self._rungs: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __contains__(self, index: int) -> bool:
        return index in self._rungs

    def put(self, index: int, fullness: float) -> None:
        """Stand the replica there, wherever it stood."""
        if self._rungs.get(index) == fullness:
            return
        self._rungs[index] = fullness
        if len(self._heap) > STALE_MIN + STALE_FACTOR * len(self._rungs):
            self._heap = [(rung, other) for other, rung in self._rungs.items()]
            heapify(self._heap)
        else:
            heappush(self._heap, (fullness, index))

    def drop(self, index: int) -> None:
        self._rungs.pop(index, None)

    def pop(self) -> int | None:
        """Take the emptiest away; None if there is none."""
        while self._heap:
            fullness, index = heappop(self._heap)
            if self._rungs.get(index) == fullness:
                del self._rungs[index]
                return index
        return None
