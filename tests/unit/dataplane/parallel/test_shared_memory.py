"""How long a rank waits for its peers at the board: in time of its own, by a clock that the test turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dataplane.parallel import shared_memory
from dataplane.parallel.shared_memory import Board, BoardTimeout, create_board

TIMEOUT_S = 2.5
PAUSE_S = 30.0


class Clock:
    """Time passes in sleep, and once, after `pause_at`, all at once, as for a process that was stopped."""

    def __init__(self, pause_at: float) -> None:
        self.now = 0.0
        self.pause_at = pause_at
        self.paused = False
        # A peer that puts its part then.
        self.peer: tuple[float, Board] | None = None

    def monotonic(self) -> float:
        self.now += 1e-6
        if self.now > self.pause_at and not self.paused:
            self.now, self.paused = self.now + PAUSE_S, True
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.peer is not None and self.now >= self.peer[0]:
            self.peer[1]._put(torch.ones(1), None)
            self.peer = None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(pause_at=1.0)
    monkeypatch.setattr(shared_memory, "time", clock)
    return clock


@pytest.fixture
def boards(tmp_path: Path) -> tuple[Board, Board]:
    create_board(tmp_path / "board", 2)
    return Board(tmp_path / "board", 2, 0), Board(tmp_path / "board", 2, 1)


def test_a_peer_that_comes_after_a_pause_of_both_is_in_time(clock: Clock, boards: tuple[Board, Board]) -> None:
    clock.peer = (PAUSE_S + TIMEOUT_S, boards[1])
    assert boards[0].gather(torch.zeros(1), TIMEOUT_S).tolist() == [[0], [1]]
    assert clock.paused


def test_a_peer_that_does_not_come_is_waited_for_so_much_longer_only(clock: Clock, boards: tuple[Board, Board]) -> None:
    with pytest.raises(BoardTimeout) as late:
        boards[0].gather(torch.zeros(1), TIMEOUT_S)
    assert late.value.missing == [1]
    assert clock.now == pytest.approx(PAUSE_S + TIMEOUT_S, abs=0.01)
