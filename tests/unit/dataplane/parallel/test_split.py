from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dataplane.parallel.split import SplitError, cut, cut_padded, split_heads, split_layers


@given(st.integers(0, 1000), st.integers(1, 64))
def test_parts_cover_everything_once_and_differ_by_one_at_most(count: int, parts: int) -> None:
    ranges = [cut(count, parts, index) for index in range(parts)]
    assert [item for start, stop in ranges for item in range(start, stop)] == list(range(count))
    assert max(stop - start for start, stop in ranges) - min(stop - start for start, stop in ranges) <= 1


@given(st.integers(1, 1000), st.integers(1, 64))
def test_padded_parts_cover_everything_once(count: int, parts: int) -> None:
    ranges = [cut_padded(count, parts, index) for index in range(parts)]
    assert [item for start, stop in ranges for item in range(start, stop)] == list(range(count))
    assert all(stop - start <= -(-count // parts) for start, stop in ranges)


@given(st.integers(1, 16), st.integers(1, 12), st.integers(1, 16))
def test_each_query_head_lies_once_and_beside_the_head_it_reads(key_value: int, group: int, ranks: int) -> None:
    query = key_value * group
    try:
        splits = [split_heads(query, key_value, ranks, rank) for rank in range(ranks)]
    except SplitError:
        assume(False)
        return
    assert [head for split in splits for head in range(*split.query)] == list(range(query))
    for split in splits:
        assert split.query_heads > 0
        assert {head // group for head in range(*split.query)} == set(range(*split.key_value))
        # Attention maps local query heads to local key/value heads by an even group size.
        assert split.query_heads % split.key_value_heads == 0
        holders = sum(other.key_value[0] <= split.key_value[0] < other.key_value[1] for other in splits)
        assert holders == split.copies


def test_heads_that_leave_a_rank_empty_are_refused_with_the_numbers() -> None:
    with pytest.raises(SplitError, match="2 query heads over 1 key/value heads cannot be cut over 4 ranks"):
        split_heads(2, 1, 4, 0)
    with pytest.raises(SplitError, match="5 query heads are no multiple of 2"):
        split_heads(5, 2, 1, 0)


def test_later_stages_get_fewer_layers() -> None:
    assert [split_layers(18, 4, stage) for stage in range(4)] == [(0, 5), (5, 10), (10, 14), (14, 18)]
    with pytest.raises(SplitError, match="3 layers cannot be cut over 4"):
        split_layers(3, 4, 0)
