"""Pipeline parallelism: hidden states from stage to stage, sampled tokens back to the first.

As many micro-batches are under way as there are stages: each stage starts its next one while the message of the last is
still travelling. Every rank of a stage talks to the rank with its own tensor index in the next, so that no stage has to
gather or spread what all its ranks hold alike.

Shape letters: T tokens of a micro-batch, H hidden size, N sampled rows.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from dataplane.parallel.groups import Group, UnderWay


class StageLink:
    """One rank's connection to the stages before and after its own."""

    def __init__(self, group: Group, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._group = group
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._under_way: deque[UnderWay] = deque()

    def send_hidden(self, hidden_TH: Tensor) -> None:
        """Hand a micro-batch to the next stage. Waits only for the one sent `stages` ago."""
        while len(self._under_way) >= self._group.size:
            self._under_way.popleft().wait()
        self._under_way.append(self._group.send(hidden_TH, self._group.index + 1))

    def receive_hidden(self, tokens: int) -> Tensor:
        """The next micro-batch of the stage before, (T, H)."""
        hidden_TH = torch.empty(tokens, self._hidden_size, dtype=self._dtype, device=self._device)
        return self._group.receive(hidden_TH, self._group.index - 1)

    def return_tokens(self, tokens_N: Tensor | None, rows: int) -> Tensor:
        """What the last stage sampled, (N,) int64, on the first stage too. Stages between get nothing to do."""
        last = self._group.size - 1
        if last == 0 or self._group.index not in (0, last):
            return torch.empty(0, dtype=torch.int64) if tokens_N is None else tokens_N
        if self._group.index == last:
            assert tokens_N is not None
            assert len(tokens_N) == rows
            self._under_way.append(self._group.send(tokens_N, 0))
            return tokens_N
        return self._group.receive(torch.empty(rows, dtype=torch.int64, device=self._device), last)

    def drain(self) -> None:
        """Wait for all that is still travelling."""
        while self._under_way:
            self._under_way.popleft().wait()
