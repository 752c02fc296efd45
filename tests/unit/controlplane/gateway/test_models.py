"""Which model a request means, and what it is told when there is none."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from controlplane.gateway.api_errors import ApiError
from controlplane.gateway.models import Catalogue
from controlplane.gateway.tokenizer import TokenizerPool
from controlplane.runtime.ids import DeploymentId
from tests.unit.controlplane.gateway.builders import row


def refused(catalogue: Catalogue, name: str | None) -> int:
    with pytest.raises(ApiError) as refusal:
        catalogue.find(name)
    return refusal.value.status


async def test_a_gateway_that_knows_nothing_yet_asks_to_come_again() -> None:
    pool = TokenizerPool(retry_ms=100)
    async with asyncio.TaskGroup() as tasks:
        catalogue = Catalogue(pool, tasks)
        for name in (None, "m"):
            assert refused(catalogue, name) == 503
        catalogue.see([], 0)
        assert (refused(catalogue, None), refused(catalogue, "m")) == (503, 404)
        other = replace(row("w2:1"), model="n", deployment=DeploymentId("other"))
        catalogue.see([row(), other], 0)
        assert (refused(catalogue, None), refused(catalogue, "o")) == (400, 404)
        assert catalogue.find("m").name == "m"
        catalogue.forget(DeploymentId("other"))
        assert catalogue.find(None).name == "m"
    pool.close()
