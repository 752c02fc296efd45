"""Fixtures of the tests against real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from controlplane.runtime.etcd_server import EtcdChild
from tests.support.etcd import client, etcd, etcd_members, keys, own_etcd
from tests.support.worker import Stage, stage

__all__ = ["client", "etcd", "etcd_members", "keys", "own_etcd"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage_etcd(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EtcdChild]:
    """One member with the timings of a cluster, which a test may stop and start."""
    folder = tmp_path_factory.mktemp("etcd")
    server = EtcdChild(data_dir=folder / "data", log_path=folder / "etcd.log")
    await server.start()
    yield server
    await server.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def played(stage_etcd: EtcdChild, tmp_path: Path) -> AsyncIterator[Stage]:
    """A cluster whose worker daemons are real."""
    async with stage(stage_etcd, tmp_path) as played:
        yield played
