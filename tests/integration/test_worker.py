"""The worker daemon as a real process, its ranks real processes, its peers played over real gRPC and a real etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.runtime.packing import pack_u32
from tests.support.rank_process import expected_tokens
from tests.support.worker import Stage, stage

pytestmark = pytest.mark.cluster


@pytest.fixture
async def played(tmp_path: Path) -> AsyncIterator[Stage]:
    async with stage(tmp_path) as played:
        yield played


async def test_a_request_streams_its_tokens(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    gateway = await played.gateway(worker)
    request = await gateway.open([1, 2, 3], epoch)
    assert await gateway.finish_of(request.choices[0].slot) == expected_tokens(pack_u32([1, 2, 3]), 7, 20)
