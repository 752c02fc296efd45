"""What is left to load: slices of whole tensors, taken by who reads files from the front and by peers from the back.

Nobody asks which of them is faster: each takes the next slice when it is done with its last one, until they meet.
Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from dataplane.models.pieces import Box, Piece, without

PORTION_BYTES = 8 * 1024 * 1024
"""A slice is at most so large: it bounds what is read twice where the two meet, and how long an interruption waits."""


@dataclass(frozen=True, slots=True)
class Slice:
    """`local[piece.to] = whole[piece.at]`, still to be done."""

    piece: Piece
    local: Tensor

    @property
    def target(self) -> Tensor:
        """The cells that it fills."""
        target = self.local
        for dim, (start, stop) in enumerate(self.piece.to):
            target = target.narrow(dim, start, stop - start)
        return target

    @property
    def bytes(self) -> int:
        return self.piece.values * self.local.itemsize

    def within(self, box: Box) -> Slice:
        return Slice(self.piece.within(box), self.local)


@dataclass(slots=True)
class Place:
    """How far one peer has looked through a list."""

    back: int
    late: int
    # Set by who wants it to stop waiting.
    stopped: threading.Event = field(default_factory=threading.Event)


Wants = Callable[[Slice], Box | None]
"""The part of a slice that a peer has, as a box of the whole tensor; None: none of it."""


class WorkList:
    """Slices by number. Each is with one reader at a time, and done once."""

    def __init__(self, slices: Iterable[Slice]) -> None:
        self._slices = list(slices)
        self._free = [True] * len(self._slices)
        # Numbers in order; what is split off or given back later stands at the end.
        self._order = list(range(len(self._slices)))
        self._front = 0
        self._changed = threading.Condition()
        self._bytes = sum(item.bytes for item in self._slices)
        self._bytes_done = 0

    def __getitem__(self, number: int) -> Slice:
        return self._slices[number]

    @property
    def share_done(self) -> float:
        """By bytes."""
        return self._bytes_done / self._bytes if self._bytes else 1.0

    def take_first(self) -> int | None:
        """The number of the first slice that nobody has; None: there is none at present."""
        with self._changed:
            while self._front < len(self._order):
                number = self._order[self._front]
                self._front += 1
                if self._take(number):
                    return number
        return None

    def place(self) -> Place:
        """For one more peer."""
        with self._changed:
            return Place(len(self._order) - 1, len(self._order))

    def take_last(self, place: Place, wants: Wants) -> int | None:
        """The number of the last slice that the peer has at least a part of, cut down to that part; waits while others
        may still give something back. None: the place was stopped."""
        with self._changed:
            while not place.stopped.is_set():
                number = self._next(place)
                if number is None:
                    self._changed.wait()
                elif self._free[number] and (box := wants(self._slices[number])) is not None:
                    self._take(number)
                    self._split(number, box)
                    return number
        return None

    def stop(self, place: Place) -> None:
        """Let a peer that waits go."""
        with self._changed:
            place.stopped.set()
            self._changed.notify_all()

    def give_back(self, number: int) -> None:
        """It was not done: another reader does it."""
        with self._changed:
            self._free[number] = True
            self._order.append(number)
            self._changed.notify_all()

    def finish(self, number: int) -> int:
        """It is done. Its bytes."""
        with self._changed:
            self._bytes_done += self._slices[number].bytes
            return self._slices[number].bytes

    def _take(self, number: int) -> bool:
        free, self._free[number] = self._free[number], False
        return free

    def _next(self, place: Place) -> int | None:
        """The next number to look at: from the back, then what came later."""
        if place.back >= 0:
            place.back -= 1
            return self._order[place.back + 1]
        if place.late < len(self._order):
            place.late += 1
            return self._order[place.late - 1]
        return None

    def _split(self, number: int, box: Box) -> None:
        whole = self._slices[number]
        rests = [whole.within(rest) for rest in without(whole.piece.at, box)]
        if not rests:
            return
        self._slices[number] = whole.within(box)
        self._order += range(len(self._slices), len(self._slices) + len(rests))
        self._slices += rests
        self._free += [True] * len(rests)
        self._changed.notify_all()
