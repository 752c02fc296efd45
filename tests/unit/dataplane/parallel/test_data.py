from __future__ import annotations

from tests.support.ranks import RankPool

JOBS = "tests.unit.dataplane.parallel.jobs"


def test_a_batch_is_spread_and_gathered_in_order(rank_pool: RankPool) -> None:
    results = rank_pool.run(f"{JOBS}:spread_batch", 3)
    assert [result["part"] for result in results] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [result["rows"] for result in results] == [[0.0, 1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    for result in results:
        assert result["gathered"] == [0, 10, 20, 30, 40, 50, 60]
        assert result["gathered rows"] == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
        assert result["gradients"] == [[1.0, 1.0], [2.0]]


def test_more_replicas_than_items(rank_pool: RankPool) -> None:
    assert rank_pool.run(f"{JOBS}:spread_few", 3) == [["only"], [], []]


def test_micro_batches_flow_through_stages_and_tokens_return(rank_pool: RankPool) -> None:
    first, middle, last = rank_pool.run(f"{JOBS}:micro_batches", 3)
    assert first == last == [[3.0], [6.0, 6.0], [9.0, 9.0, 9.0], [12.0] * 4]
    assert middle == []
