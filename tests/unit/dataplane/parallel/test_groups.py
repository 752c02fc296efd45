from __future__ import annotations

import pytest
import torch

from dataplane.parallel.groups import Group
from dataplane.parallel.shared_memory import FOLDER
from tests.support.ranks import RankPool

JOBS = "tests.unit.dataplane.parallel.jobs"


def test_every_primitive_on_three_ranks(rank_pool: RankPool) -> None:
    results = rank_pool.run(f"{JOBS}:exchange", 3)
    for rank, result in enumerate(results):
        assert result["board"]
        for size in ("small", "large"):
            for dtype in ("torch.float32", "torch.bfloat16", "torch.int64"):
                assert result[f"{size} sum {dtype}"] == [6]
                assert result[f"{size} max {dtype}"] == [3]
                assert result[f"{size} min {dtype}"] == [1]
            assert result[f"{size} mean torch.float32"] == [2.0]
            assert result[f"{size} all_gather"] == [3, [0, 1, 2]]
            assert result[f"{size} broadcast"] == 1.0
            assert result[f"{size} reduce"] == (3.0 if rank == 1 else None)
        assert result["costs"]["all_reduce"] == [23, True]


def test_plain_data_travels_without_pickle(rank_pool: RankPool) -> None:
    results = rank_pool.run(f"{JOBS}:plain_data", 2)
    for rank, result in enumerate(results):
        assert result == {
            "broadcast": {"from": 1, "ids": [1, 2]},
            "long": 200_000,
            "gather": [["rank", 0], ["rank", 1, "rank", 1]],
            "sum": {"loss": 1.0, "tokens": [1, 2]},
            "mean": 0.5,
            "max to 0": 1 if rank == 0 else None,
            "many": [[2.0, 2.0], [2, 2, 2]],
        }


def test_a_sum_has_the_same_bits_on_every_rank(rank_pool: RankPool) -> None:
    results = rank_pool.run(f"{JOBS}:sums_are_the_same_bits", 3)
    assert results[0] == results[1] == results[2]


def test_a_result_in_pieces_is_the_sum_of_the_whole(rank_pool: RankPool) -> None:
    exchanges = {"1": [0.0, 1, 1], "1024": [0.0, 1, 1], "2047": [0.0, 1, 1], "3000": [0.0, 1, 2], "9001": [0.0, 1, 4]}
    assert rank_pool.run(f"{JOBS}:sums_by_pieces", 2) == [exchanges, exchanges]


def test_a_sum_under_way_whose_peer_is_lost_is_an_error_with_names(rank_pool: RankPool) -> None:
    assert rank_pool.run(f"{JOBS}:lost_under_way", 2) == [["tensor", "2", "all_reduce"], []]


def test_boards_survive_dawdling_ranks_and_mixed_exchanges(rank_pool: RankPool) -> None:
    assert rank_pool.run(f"{JOBS}:many_exchanges", 3) == [0, 0, 0]


@pytest.mark.parametrize("board", [True, False])
def test_an_abort_frees_a_stuck_rank_which_then_forms_the_next_epoch(board: bool, rank_pool: RankPool) -> None:
    first, second = rank_pool.run(f"{JOBS}:stuck", 2, board=board)
    assert first == ["tensor", True, True, 2.0]
    assert second == [2.0]


@pytest.mark.parametrize("board", [True, False])
def test_a_peer_that_does_not_come_in_time_is_an_error_with_names(board: bool, rank_pool: RankPool) -> None:
    (group, number, text), _ = rank_pool.run(f"{JOBS}:late", 2, board=board)
    assert (group, number) == ("tensor", 1)
    assert "rank 1 did not come" in text if board else "Timed out" in text


def test_a_process_lives_through_many_epochs_of_many_shapes(rank_pool: RankPool) -> None:
    results = rank_pool.run(f"{JOBS}:epochs", 4)
    # control, world, tensor, pipeline, data of each mesh: the sums of the ranks along that axis
    assert results[0] == [6, 6, 1, 2, 0, 6, 6, 6, 0, 0, 6, 6, 0, 6, 0, 1, 6, 1, 0, 2, 0, 6, 0, 0, 6]
    assert results[3][:5] == [6, 6, 5, 4, 3]


def test_point_to_point_and_all_to_all(rank_pool: RankPool) -> None:
    assert rank_pool.run(f"{JOBS}:point_to_point", 3) == [[2, 0, 1, 2], [0, 0, 1, 2], [1, 0, 1, 2]]


def test_no_board_is_left_behind(rank_pool: RankPool) -> None:
    rank_pool.run(f"{JOBS}:plain_data", 2)
    assert not list(FOLDER.glob("perdure-test*"))


def test_a_group_of_one_changes_nothing() -> None:
    group = Group("tensor", (3,), 0)
    x = torch.arange(3)
    assert group.all_reduce(x) is x
    assert group.all_gather(x).tolist() == [[0, 1, 2]]
    assert group.broadcast(x, 0) is x
    group.barrier()
    assert group.costs == {}
