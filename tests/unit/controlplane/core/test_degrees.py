"""Smaller degrees: which there are, and in which order they are tried."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.degrees import is_smaller, named, ranks_of, smaller
from controlplane.runtime.messages.common import ParallelDegrees


def names(tensor: int = 1, pipeline: int = 1, expert: int = 1, above: int = 0) -> list[str]:
    full = ParallelDegrees(tensor=tensor, pipeline=pipeline, expert=expert)
    return [named(degrees) for degrees in smaller(full, above)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (names(), []),
        (names(tensor=2), ["tp1"]),
        (names(tensor=6), ["tp3", "tp2", "tp1"]),
        (names(pipeline=3), ["pp2", "tp1"]),
        (names(tensor=2, pipeline=2), ["tp2", "pp2", "tp1"]),
        (names(tensor=4, pipeline=2), ["tp4", "tp2×pp2", "tp2", "pp2", "tp1"]),
        (names(tensor=4, expert=4), ["tp2×ep2", "tp1"]),
        (names(tensor=4, expert=2), ["tp2×ep2", "tp1"]),
        (names(tensor=8, above=2), ["tp4"]),
    ],
)
def test_most_ranks_first_then_the_largest_tensor_groups(found: list[str], expected: list[str]) -> None:
    assert found == expected


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 12))
def test_what_is_smaller_is_recognised_and_nothing_else(tensor: int, pipeline: int, expert: int) -> None:
    full = ParallelDegrees(tensor=tensor, pipeline=pipeline, expert=expert if tensor % expert == 0 else 1)
    found = smaller(full)
    for degrees in found:
        assert full.tensor % degrees.tensor == 0
        assert full.expert % degrees.expert == degrees.tensor % degrees.expert == 0
        assert ranks_of(degrees) < ranks_of(full)
    for other in (ParallelDegrees(tensor=t, pipeline=p, expert=full.expert) for t in range(1, 13) for p in range(1, 5)):
        assert is_smaller(other, full) == (other in found)
