"""Which model a request means, and what it is told when there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from controlplane.gateway.api_errors import ApiError
from controlplane.gateway.models import Catalogue
from controlplane.gateway.tokenizer import TokenizerPool
from controlplane.runtime.ids import DeploymentId, ReplicaId
from controlplane.runtime.messages.common import Capacity, ReplicaPhase
from controlplane.runtime.messages.route import ReplicaRow
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


@asynccontextmanager
async def catalogue_of(*rows: ReplicaRow) -> AsyncIterator[Catalogue]:
    pool = TokenizerPool(retry_ms=100)
    async with asyncio.TaskGroup() as tasks:
        catalogue = Catalogue(pool, tasks)
        catalogue.see(rows, 0)
        yield catalogue
    pool.close()


def serving(worker: str, path: str, tokens: int, *, outdated: bool = False, ready: bool = True) -> ReplicaRow:
    capacity = Capacity(
        total_blocks=9, block_tokens=16, max_sequences=8, max_batch_tokens=64, max_model_tokens=tokens, fingerprint=path
    )
    phase = ReplicaPhase.READY if ready else ReplicaPhase.LOADING
    return replace(row(worker, phase=phase), model_path=path, capacity=capacity, outdated=outdated)


async def test_of_two_models_under_one_name_the_one_that_more_replicas_serve_is_asked() -> None:
    """In whatever order they are told; the other one's limits are not its own."""
    old, older = serving("w1:1", "/old", 512, outdated=True), serving("w2:1", "/old", 512, outdated=True)
    new, newer = serving("w1:1", "/new", 4096), serving("w2:1", "/new", 4096, ready=False)
    for rows, path, tokens in (
        ([old, older], "/old", 512),
        ([replace(new, phase=ReplicaPhase.LOADING), older], "/old", 512),
        ([new, older], "/new", 4096),
        ([new, newer], "/new", 4096),
        ([newer], "/new", 4096),
    ):
        for told in (rows, rows[::-1]):
            async with catalogue_of(*told) as catalogue:
                found = catalogue.find("m")
                assert (found.model_path, found.context_tokens) == (path, tokens)


async def test_the_name_that_a_deployment_has_left_is_known_no_more() -> None:
    renamed = replace(row(), model="n", model_path="/n")
    async with catalogue_of(row()) as catalogue:
        catalogue.see([row(), replace(renamed, replica=ReplicaId("r-2"))], 0)
        assert {model.name for model in catalogue.all()} == {"m", "n"}
        catalogue.see([], 0)
        assert {model.name for model in catalogue.all()} == {"m", "n"}
        catalogue.see([renamed], 0)
        assert refused(catalogue, "m") == 404
        assert catalogue.find(None).name == "n"


async def test_a_stream_goes_on_with_the_model_that_it_began_with() -> None:
    async with catalogue_of(replace(row(), model_path="/new")) as catalogue:
        current = catalogue.find("m")
        assert catalogue.begun("m", current.deployment, "") is current
        assert catalogue.begun("m", current.deployment, "/new") is current
        for name in ("m", "of-before"):
            begun = catalogue.begun(name, current.deployment, "/old")
            assert (begun.name, begun.model_path) == (name, "/old")
