"""Work of batch-invariant attention: what each query is given does not depend on its step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from dataplane.engine.arrangement import Runs
from dataplane.engine.splits import SPLIT_TOKENS, Split, split

QUERIES = 16

# (first position, tokens).
ENTRIES = [(0, 1), (3000, 1), (0, 40), (500, 30), (511, 1), (1023, 3), (600, 2000), (512, 1)]


def runs_of(entries: list[tuple[int, int]], padding: int = 0) -> Runs:
    starts, counts = (np.array(column) for column in zip(*entries, strict=True))
    offsets = np.cumsum(counts) - counts
    return Runs(starts, counts, offsets, offsets * 7, int(counts.sum()) + padding)


def ranges_by_row(launches: list[Split]) -> dict[int, list[tuple[int, int]]]:
    """The positions that each row's result is put together from, in the order of merging."""
    found: dict[int, list[tuple[int, int]]] = {}
    for launch in launches:
        by_part: dict[int, tuple[int, int]] = {}
        for row, count, _first, _table, begin, end, part, _ in launch.tiles.tolist():
            for query in range(count):
                if part < 0:
                    assert row + query not in found, "two results for one row"
                    found[row + query] = [(begin, end)]
                else:
                    assert part + query not in by_part, "two results in one place"
                    by_part[part + query] = (begin, end)
        assert sorted(by_part) == list(range(launch.parts))
        for row, first, parts, step in launch.merges.tolist():
            assert row not in found
            found[row] = [by_part[first + number * step] for number in range(parts)]
    return found


@pytest.mark.parametrize("window", [None, 40, 700])
@pytest.mark.parametrize("merge_all", [False, True])
@pytest.mark.parametrize("parts_max", [50, 1 << 20])
def test_each_query_meets_its_positions_in_order(window: int | None, merge_all: bool, parts_max: int) -> None:
    runs = runs_of(ENTRIES, padding=5)
    found = ranges_by_row(split(runs, window, QUERIES, parts_max, merge_all=merge_all))
    assert sorted(found) == list(range(runs.rows))
    for (start, count), offset in zip(ENTRIES, runs.offsets_E.tolist(), strict=True):
        for query in range(count):
            ranges = found[offset + query]
            assert all(begin % SPLIT_TOKENS == 0 and end == begin + SPLIT_TOKENS for begin, end in ranges)
            assert all(a[1] == b[0] for a, b in pairwise(ranges))
            position = start + query
            assert ranges[0][0] <= max(position - (window or position + 1) + 1, 0)
            assert ranges[-1][1] > position


def test_the_parts_of_one_launch_are_bounded() -> None:
    launches = split(runs_of(ENTRIES), None, QUERIES, 50, merge_all=False)
    assert len(launches) > 10
    largest_tile = QUERIES * (3000 // SPLIT_TOKENS + 1)
    assert all(launch.parts < 50 + largest_tile for launch in launches)


def test_a_step_of_nothing_has_one_launch_of_padding() -> None:
    none = np.zeros(0, dtype=np.int64)
    (launch,) = split(Runs(none, none, none, none, 20), None, QUERIES, 50, merge_all=True)
    assert launch.tiles[:, :3].tolist() == [[0, 16, -16], [16, 4, -16]]
    assert not launch.parts
    assert not len(launch.merges)
