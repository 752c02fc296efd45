"""Which models this cluster serves, as the leader's replica table tells, and their tokenizers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from controlplane.gateway.api_errors import SERVER_ERROR, ApiError
from controlplane.gateway.tokenizer import ModelTokenizer, TokenizerMissing, TokenizerPool
from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import Capacity, ReplicaPhase
from controlplane.runtime.messages.route import ReplicaRow

BLOCK_TOKENS_DEFAULT = 16

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class ServedModel:
    """A name that clients may ask for."""

    name: str
    deployment: DeploymentId
    model_path: str
    numerics: str
    seen_wall_s: int
    capacities: dict[str, Capacity] = field(default_factory=dict)
    tokenizer: ModelTokenizer | None = None
    failure: str = ""

    @property
    def context_tokens(self) -> int:
        """Most tokens a sequence may have, prompt and answer; 0 if nobody says."""
        limits = [capacity.max_model_tokens for capacity in self.capacities.values() if capacity.max_model_tokens]
        if limits:
            return min(limits)
        return self.tokenizer.context_tokens if self.tokenizer is not None else 0

    @property
    def fingerprint(self) -> str:
        """What seeds its replicas' prefix hashes; "" before one has loaded."""
        return next((capacity.fingerprint for capacity in self.capacities.values()), "")

    @property
    def block_tokens(self) -> int:
        return min((capacity.block_tokens for capacity in self.capacities.values()), default=BLOCK_TOKENS_DEFAULT)


class Catalogue:
    """Models by name. A model without a replica stays known: its requests wait for one, or are told so."""

    def __init__(self, pool: TokenizerPool, tasks: asyncio.TaskGroup) -> None:
        self._pool = pool
        self._tasks = tasks
        self._models: dict[str, ServedModel] = {}
        self._loads: dict[str, asyncio.Task[ModelTokenizer | str]] = {}
        self.told = False

    def see(self, rows: Iterable[ReplicaRow], wall_s: int) -> None:
        """Take the replica table as it stands now."""
        self.told = True
        for model in self._models.values():
            model.capacities.clear()
        by_name: dict[str, list[ReplicaRow]] = {}
        for row in rows:
            # Without a model's name its deployment was removed; the replica only ends.
            if row.model:
                by_name.setdefault(row.model, []).append(row)
        for name, found in by_name.items():
            self._see_model(name, found, wall_s)
        # A deployment that is there under another name only has left its former one.
        told = {row.deployment for found in by_name.values() for row in found}
        self._models = {
            name: model for name, model in self._models.items() if name in by_name or model.deployment not in told
        }

    def _see_model(self, name: str, rows: Sequence[ReplicaRow], wall_s: int) -> None:
        """Take the replicas that serve under one name. While a deployment goes over from one model to another there are
        two: new requests are for the one that more replicas serve."""
        served = Counter(row.model_path for row in rows if row.phase is ReplicaPhase.READY)
        row = max(rows, key=lambda row: (served[row.model_path], not row.outdated))
        model = self._models.get(name)
        if model is None or model.deployment != row.deployment or model.model_path != row.model_path:
            model = ServedModel(row.model, row.deployment, row.model_path, row.numerics, wall_s)
            self._models[row.model] = model
            log.info("model_seen", model=row.model, deployment=row.deployment, model_path=row.model_path)
            self._load(row.model_path)
        for other in rows:
            if other.capacity is not None and other.model_path == model.model_path:
                model.capacities[other.replica] = other.capacity

    async def expect(self, model_paths: Iterable[str]) -> None:
        """Load the tokenizers of models that will be served soon; one that can't be is reported when it is used."""
        for load in [self._load(path) for path in model_paths]:
            await asyncio.shield(load)

    def forget(self, deployment: DeploymentId) -> None:
        """The leader knows no such deployment any more."""
        self._models = {name: model for name, model in self._models.items() if model.deployment != deployment}

    def all(self) -> list[ServedModel]:
        return list(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of that name, or the only one if no name is given. Raises ApiError."""
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        model = self._models.get(name) if name is not None else None
        if model is not None:
            return model
        if not self.told:
            text = "no coordinator has told yet which models are served"
            raise ApiError(503, text, kind=SERVER_ERROR, code="unavailable", retry_after_s=1)
        if name is None and self._models:
            raise ApiError(400, "you must provide a model parameter", param="model")
        if name is None:
            raise ApiError(503, "no model is served now", kind=SERVER_ERROR, code="unavailable", retry_after_s=1)
        raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")

    def begun(self, name: str, deployment: DeploymentId, model_path: str) -> ServedModel:
        """The model with which a stream began: the one of that name, unless another took its place. Raises ApiError."""
        known = self._models.get(name)
        if not model_path or (known is not None and known.model_path == model_path):
            return self.find(name)
        return ServedModel(name, deployment, model_path, numerics="", seen_wall_s=0)

    async def ready(self, model: ServedModel) -> ModelTokenizer:
        """Its tokenizer, waiting until it is loaded. Raises ApiError if it can't be."""
        if model.tokenizer is None:
            loaded = await asyncio.shield(self._load(model.model_path))
            if isinstance(loaded, str):
                raise ApiError(503, f"the model has no tokenizer: {loaded}", kind=SERVER_ERROR, code="unavailable")
            model.tokenizer = loaded
        return model.tokenizer

    def _load(self, model_path: str) -> asyncio.Task[ModelTokenizer | str]:
        task = self._loads.get(model_path)
        if task is None or (task.done() and isinstance(task.result(), str)):
            task = self._tasks.create_task(self._read(model_path), name=f"tokenizer {model_path}")
            self._loads[model_path] = task
        return task

    async def _read(self, model_path: str) -> ModelTokenizer | str:
        try:
            return await self._pool.load(Path(model_path))
        except (TokenizerMissing, OSError) as error:
            log.warning("tokenizer_refused", model_path=model_path, reason=str(error))
            return str(error)
