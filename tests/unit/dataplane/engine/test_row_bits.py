from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dataplane.engine.row_bits import (
    COUNTS,
    PADDED_ROWS,
    PADDED_SHARE,
    by_counts,
    cut,
    is_steady,
    probe_rows,
    steady_counts,
)


class Library:
    """A product whose order of adding turns on how many rows there are, and may turn on where a row stands."""

    def __init__(self, *, other: set[int], place: int | None = None) -> None:
        self.other = other
        self.place = place
        self.asked: list[int] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.asked.append(len(rows))
        backwards = torch.full((len(rows), 1), len(rows) in self.other)
        if self.place is not None and len(rows) > self.place:
            backwards[self.place] = True
        halves = rows[:, :8].double().sum(1, keepdim=True), rows[:, 8:].double().sum(1, keepdim=True)
        return torch.where(backwards, halves[0] * 3 - halves[1], halves[0] - halves[1]).float()


def test_numbers_of_rows_with_other_bits_are_left_out() -> None:
    library = Library(other={12, 48, 64, 80})
    assert steady_counts(library, probe_rows(100, 16, torch.float32)) == (4, 8, 16, 20, 24, 28, 32, 40, 56, 96)
    assert max(library.asked) == 96


def test_the_least_number_is_one_in_which_places_are_alike() -> None:
    assert not is_steady(Library(other=set(), place=3), probe_rows(4, 16, torch.float32))
    assert is_steady(Library(other=set(), place=3), probe_rows(3, 16, torch.float32))
    assert steady_counts(Library(other=set(), place=0), probe_rows(64, 16, torch.float32)) == (1,)


@given(st.integers(1, 3000), st.sets(st.sampled_from(COUNTS), min_size=1).map(lambda some: tuple(sorted(some))))
def test_parts_cover_all_rows_and_fill_up_the_last_alone(count: int, counts: tuple[int, ...]) -> None:
    sizes = cut(count, counts)
    assert set(sizes) <= set(counts)
    assert sum(sizes[:-1]) < count <= sum(sizes)
    assert sum(sizes) - count <= max(PADDED_ROWS, counts[0] - 1, count // PADDED_SHARE)


def test_only_these_numbers_are_asked_for() -> None:
    library = Library(other={5, 9, 10, 11, 37})
    rows = probe_rows(37, 16, torch.float32)
    for count in (1, 5, 9, 10, 11, 32, 37):
        wanted = torch.cat([library(rows[index : index + 1]) for index in range(count)])
        library.asked.clear()
        assert torch.equal(by_counts(library, rows[:count], (4, 8, 32)), wanted)
        assert set(library.asked) <= {4, 8, 32}
