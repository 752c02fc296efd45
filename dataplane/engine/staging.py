"""A step's integers on their way to the device: one copy from pinned memory into one buffer.

The buffer stays where it is, so that captured work finds the next step's integers at the same addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGN = 4
"""Sections begin at multiples of so many integers (16 bytes)."""

_RING = 3
"""Pinned buffers in turn: a copy may still wait for the steps before it."""


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """Integers for the device, and what stands behind them up to `capacity` (0: as many as there are)."""

    values: npt.NDArray[np.int64]
    capacity: int = 0
    fill: int = 0

    @property
    def size(self) -> int:
        return max(self.capacity, self.values.size)


@dataclass(slots=True)
class _Pinned:
    memory: Tensor
    used: torch.cuda.Event | None = None
    # The same memory for numpy.
    array: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.array = self.memory.numpy()


class Staging:
    """Owns both ends of the copy."""

    def __init__(self, integers: int, device: torch.device) -> None:
        """For steps of up to so many integers."""
        self._device_memory = torch.zeros(integers, dtype=torch.int32, device=device)
        self._ring = [_Pinned(torch.zeros(integers, dtype=torch.int32, pin_memory=True)) for _ in range(_RING)]
        self._turn = 0

    def stage(self, sections: Sequence[Section]) -> list[Tensor]:
        """Start the copy; the sections as flat int32 tensors on the device. Equal sizes give equal addresses. What an
        earlier call gave is overwritten, after the work launched before."""
        pinned = self._ring[self._turn]
        self._turn = (self._turn + 1) % _RING
        if pinned.used is not None:
            pinned.used.synchronize()
        views: list[Tensor] = []
        at = 0
        for section in sections:
            size, given = section.size, section.values.size
            pinned.array[at : at + given] = section.values.reshape(-1)
            pinned.array[at + given : at + size] = section.fill
            views.append(self._device_memory[at : at + size])
            at += -(-size // _ALIGN) * _ALIGN
        self._device_memory[:at].copy_(pinned.memory[:at], non_blocking=True)
        pinned.used = torch.cuda.Event()
        pinned.used.record()
        return views
