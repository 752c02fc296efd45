"""The emptiest replica first, wherever each was put last."""

from __future__ import annotations

from random import Random

import pytest

from controlplane.core.ladder import STALE_FACTOR, STALE_MIN, Ladder


def test_each_stands_where_it_was_put_last() -> None:
    ladder = Ladder()
    for index, fullness in ((1, 0.5), (2, 0.25), (1, 0.1), (3, 0.25), (2, 0.75)):
        ladder.put(index, fullness)
    ladder.drop(3)
    assert [ladder.pop(), ladder.pop(), ladder.pop()] == [1, 2, None]


def test_one_that_comes_back_stands_once() -> None:
    ladder = Ladder()
    for fullness in (0.5, 0.25, 0.5):
        ladder.put(1, fullness)
    assert [ladder.pop(), ladder.pop()] == [1, None]
    ladder.put(1, 0.5)
    assert 1 in ladder
    assert [ladder.pop(), ladder.pop()] == [1, None]


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_sorting_and_stays_small(seed: int) -> None:
    random, ladder, truth = Random(seed), Ladder(), dict[int, float]()
    for _ in range(2000):
        index = random.randrange(20)
        if random.random() < 0.1:
            ladder.drop(index)
            truth.pop(index, None)
        else:
            truth[index] = random.randrange(8) / 8
            ladder.put(index, truth[index])
        assert len(ladder._heap) <= STALE_MIN + STALE_FACTOR * 20 + 1
        if random.random() < 0.1:
            expected = min(truth, key=lambda one: (truth[one], one), default=None)
            assert ladder.pop() == expected
            if expected is not None:
                del truth[expected]
