"""A replica of several ranks behind the gateway: the tokens of transformers, also when one of the ranks is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.cluster import Cluster
from tests.support.models import tiny_model
from tests.support.streams import UNFINISHED, Stream, Wave, start_wave
from tests.unit.dataplane.engine.reference import greedy

pytestmark = [pytest.mark.cluster, pytest.mark.chaos]

STREAMS = 4
TOKENS = 48


def wave(cluster: Cluster) -> Wave:
    return start_wave(cluster.address(), cluster.url(), STREAMS, TOKENS)


def assert_transformers_own(streams: list[Stream], model: Path) -> None:
    """Every stream ended well, with the greedy tokens that transformers gives for its prompt."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for stream in streams:
        assert not stream.error, stream.error
        assert stream.finish
        wanted = greedy(model, tokenizer.encode(stream.prompt).ids, TOKENS)
        if stream.tokens:
            assert stream.tokens == wanted
        # Bytes of an unfinished character are held back at the end.
        assert stream.text.rstrip(UNFINISHED) == tokenizer.decode(wanted).rstrip(UNFINISHED)


async def test_a_replica_over_two_workers_outlives_each_of_its_ranks(tmp_path: Path) -> None:
    """Two stages of two tensor ranks that share the experts; a rank that is not the driver dies, then the driver, then
    one stops in a collective, then both daemons die at once."""
    model = tiny_model(tmp_path, "qwen3_moe", max_position_embeddings=1024)
    degrees: dict[str, Any] = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 2}
    cluster = Cluster(tmp_path / "cluster", model, workers=2, devices_per_worker=2, replicas=1, parallelism=degrees)
    try:
        await cluster.start()
        ranks = await cluster.ranks()
        assert sorted(rank["node"] for rank in ranks) == ["w0", "w0", "w1", "w1"]
        for victim, number in ((3, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)):
            running = wave(cluster)
            await running.reach(8)
            hit = next(rank for rank in await cluster.ranks() if rank["rank"] == victim)
            os.kill(hit["pid"], number)
            assert_transformers_own(await running.finish(), model)
            status = await cluster.wait_ready()
            assert int(status["replicas"][0]["epoch"]) > int(hit["epoch"])
            assert hit["pid"] not in [rank["pid"] for rank in await cluster.ranks()]
        running = wave(cluster)
        await running.reach(8)
        for daemon in cluster.workers.values():
            daemon.kill()
        for daemon in cluster.workers.values():
            daemon.start()
        assert_transformers_own(await running.finish(), model)
    finally:
        await cluster.stop()
