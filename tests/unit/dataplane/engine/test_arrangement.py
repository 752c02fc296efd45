"""How a step's attention is cut for the GPU: every position of every row exactly once, within what a graph holds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dataplane.engine.arrangement import Arrangement, DenseRun, Runs, arrange, spare_items, tiles_max

QUERIES = 32

Entry = tuple[int, int]
"""Start and count."""

entries = st.lists(st.tuples(st.integers(0, 5000), st.just(1) | st.integers(1, 300)), max_size=40)


def make_runs(chosen: list[Entry], padding: int) -> Runs:
    starts = np.array([start for start, _ in chosen], dtype=np.int64)
    counts = np.array([count for _, count in chosen], dtype=np.int64)
    tables = np.arange(len(chosen), dtype=np.int64) * 1000
    return Runs(starts, counts, np.cumsum(counts) - counts, tables, int(counts.sum()) + padding)


def seen(work: Arrangement) -> dict[int, list[tuple[int, int, int]]]:
    """By row: (table, first position, end) of all work that covers it."""
    covered: dict[int, list[tuple[int, int, int]]] = {}
    for row, table, begin, end, *_ in work.items.tolist():
        covered.setdefault(row, []).append((table, begin, end))
    for row, count, first, table, *_ in work.tiles.tolist():
        for query in range(count):
            covered.setdefault(row + query, []).append((table, 0, first + query + 1 if first >= 0 else 0))
    return {row: sorted(parts) for row, parts in covered.items()}


@given(entries, st.none() | st.integers(1, 700), st.integers(0, 9), st.sampled_from([1, 4, 8]))
def test_every_row_sees_its_positions_once(
    chosen: list[Entry], window: int | None, padding: int, kv_heads: int
) -> None:
    runs = make_runs(chosen, padding)
    spare = spare_items(0, kv_heads)
    work = arrange(runs, window, spare, QUERIES, may_be_dense=False, mixed=True)
    covered = seen(work)
    assert sorted(covered) == list(range(runs.rows))
    for entry, (start, count) in enumerate(chosen):
        table = 1000 * entry
        for number in range(count):
            parts = covered[int(runs.offsets_E[entry]) + number]
            end = start + number + 1
            begin = max(end - window, 0) if window is not None and count == 1 else 0
            assert parts[0][1] == begin
            assert parts[-1][2] == end
            assert all(a[2] == b[1] for a, b in pairwise(parts)), "a gap or an overlap"
            assert {part[0] for part in parts} == {table}
    for row in range(runs.tokens, runs.rows):
        assert covered[row][0][2] == 0, "a row of padding sees nothing"
    singles = sum(count == 1 for _, count in chosen)
    assert len(work.items) <= singles + spare
    assert len(work.merges) <= min(singles, spare)
    assert len(work.tiles) <= tiles_max(runs.rows)


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=20))
def test_merges_name_the_parts_of_their_row(positions: list[int]) -> None:
    runs = make_runs([(position, 1) for position in positions], 0)
    work = arrange(runs, None, spare_items(len(positions), 8), QUERIES, may_be_dense=False)
    merged: set[int] = set()
    for row, first, count, _ in work.merges.tolist():
        assert count > 1
        assert work.items[first : first + count, 0].tolist() == [row] * count
        assert work.items[first : first + count, 4].tolist() == list(range(first, first + count))
        merged.update(range(first, first + count))
    alone = set(range(len(work.items))) - merged
    assert all(work.items[index, 4] == -1 for index in alone)


def test_equal_prompts_are_attended_densely_together() -> None:
    runs = make_runs([(7, 1), (0, 2048), (0, 2048), (16, 2048), (0, 1024), (0, 100)], 0)
    work = arrange(runs, None, 0, QUERIES, may_be_dense=True)
    assert work.dense == (DenseRun(1, 2, 2048), DenseRun(1 + 3 * 2048, 1, 1024))
    rows = {int(row) for row in work.tiles[:, 0]}
    assert min(rows) == 1 + 2 * 2048
    assert arrange(runs, 1500, 0, QUERIES, may_be_dense=True).dense == (DenseRun(1 + 3 * 2048, 1, 1024),)
