"""The benchmark's requests are those that figures of other engines were taken with."""

from __future__ import annotations

from tools.bench.rows import Row
from tools.bench.workloads import SHAPES, mixed_jobs


def test_mixed_requests_have_the_known_sizes() -> None:
    jobs = mixed_jobs()
    assert len(jobs) == 256
    assert sum(len(job.prompt) for job in jobs) == 142_827
    assert sum(job.answer_tokens for job in jobs) == 133_966


def test_shapes_know_their_bytes() -> None:
    assert SHAPES["8b"].cache_bytes_a_token == 131_072
    assert SHAPES["8b"].parameters == 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    assert sum(outputs * inputs for outputs, inputs in SHAPES["0.6b"].linears()) == SHAPES["0.6b"].parameters


def test_a_share_above_one_is_better_either_way() -> None:
    assert Row("x", "y", 2.0, "ms", 3.0).share == 1.5
    assert Row("x", "y", 3.0, "tok/s", 2.0, higher_is_better=True).share == 1.5
    assert Row("x", "y", 3.0, "s").share is None
