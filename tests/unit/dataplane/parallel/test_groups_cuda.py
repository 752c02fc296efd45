"""Groups of several GPUs of one host: NCCL, and the memory that they share."""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]

JOBS = "tests.unit.dataplane.parallel.jobs_cuda"
OF_FOUR = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="there are no four CUDA devices")
SIZES = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=OF_FOUR)])


def test_every_primitive_over_nccl(rank_pool: RankPool) -> None:
    results = rank_pool.run("tests.unit.dataplane.parallel.jobs:exchange", 2, kind="cuda")
    for rank, result in enumerate(results):
        for size in ("small", "large"):
            for dtype in ("torch.float32", "torch.bfloat16", "torch.int64"):
                assert [result[f"{size} {operation} {dtype}"] for operation in ("sum", "max", "min")] == [[3], [2], [1]]
            assert result[f"{size} mean torch.float32"] == [1.5]
            assert result[f"{size} all_gather"] == [2, [0, 1]]
            assert result[f"{size} broadcast"] == 1.0
            assert result[f"{size} reduce"] == (1.0 if rank == 1 else None)


@SIZES
def test_shared_memory_gives_every_rank_the_sum_rounded_once(rank_pool: RankPool, ranks: int) -> None:
    results = rank_pool.run(f"{JOBS}:board_sums", ranks)
    for result in results:
        assert result["wrong"] == []
        assert result["bits"] == results[0]["bits"]
        assert result["fits"] == [False, True]


@SIZES
def test_a_result_in_pieces_is_the_sum_of_the_whole(rank_pool: RankPool, ranks: int) -> None:
    for result in rank_pool.run("tests.unit.dataplane.parallel.jobs:sums_by_pieces", ranks, kind="cuda"):
        assert [difference for difference, *_ in result.values()] == [0.0] * len(result)
        assert result["9001"][2] == 4


@SIZES
def test_captured_sums_wait_for_each_other(rank_pool: RankPool, ranks: int) -> None:
    assert rank_pool.run(f"{JOBS}:captured_sums", ranks) == [0] * ranks


@SIZES
@pytest.mark.parametrize("how", ["board", "graph", "nccl"])
def test_an_abort_frees_a_gpu_that_waits_for_a_lost_rank(how: str, rank_pool: RankPool, ranks: int) -> None:
    stuck, *others = rank_pool.run(f"{JOBS}:stuck", ranks, how=how)
    assert stuck == ["tensor", True, ranks]
    assert others == [[ranks]] * (ranks - 1)
