"""A step's tokens on their way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """A copy to the host that starts now; work that is launched later does not hold it up."""

    def __init__(self, values_N: Tensor) -> None:
        self._values_N = values_N
        self._done: torch.cuda.Event | None = None
        if values_N.is_cuda:
            self._values_N = torch.empty(values_N.shape, dtype=values_N.dtype, pin_memory=True)
            self._values_N.copy_(values_N, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> list[int]:
        """The values, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._values_N.tolist()
