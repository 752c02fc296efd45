"""Fixtures of the data plane's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ReplicaSpec
from dataplane.frames import Exit, Hello
from tests.support.models import tiny_model
from tests.support.rank_daemon import ANSWER_S, Daemon
from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four processes that run jobs as ranks, started once."""
    with RankPool(4, tmp_path_factory.mktemp("ranks") / "log") as pool:
        yield pool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(scope="module")
def spec(model: Path) -> ReplicaSpec:
    return ReplicaSpec(deployment=DeploymentId("d"), model_path=str(model), kv_cache_tokens=2048, cpu_threads=1)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("rank"))
    hello = daemon.expect(Hello)
    assert (hello.pid, hello.device) == (daemon.process.pid, "cpu:0")
    yield daemon
    daemon.send(Exit())
    assert daemon.process.wait(ANSWER_S) == 0, "a rank leaves in order when told"
    daemon.close()
