"""What a rank holds from one epoch to the next: a model's weights and what runs them; and what others may copy of them.

A model of another shard takes the place of the one before only after that has gone: two do not fit on one device. Its
values come from files, which the page cache mostly still has from the load before, and from peers; not from the old
shard, whose memory would have to turn into the new one's tensor by tensor for what is at best half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch

from controlplane.runtime.messages.common import ReplicaSpec
from controlplane.runtime.messages.weights import HeldWeights
from dataplane.engine.engine import Engine
from dataplane.engine.follower import Follower
from dataplane.engine.sizing import available_bytes
from dataplane.models.fit import FittedModel, ModelLoad, begin_load, fingerprint, model_files
from dataplane.models.page_cache import Warmer
from dataplane.models.shelf import ShelfServer
from dataplane.models.weights import Report
from dataplane.parallel.mesh import Mesh

BUILD_SHARE = 0.2
"""Building a model as a share of its load; reading is the rest."""

WARM_SHARE = 0.5
"""Of available memory: larger models would push each other out of the page cache."""

_log = structlog.get_logger()


class Interrupted(Exception):
    """Raised by a report to end a load in order; what is there so far is kept."""


@dataclass(slots=True)
class Held:
    """Weights on the device, and what runs them while its spec lasts."""

    model: FittedModel
    spec: ReplicaSpec
    engine: Engine | Follower | None = None


class Holding:
    """A rank's weights."""

    def __init__(self, device: torch.device, told: Callable[[HeldWeights | None], None]) -> None:
        """`told` hears of what is held whenever it is shown, and when it goes."""
        self._device = device
        self._told = told
        self._held: Held | None = None
        self._begun: ModelLoad | None = None
        self._server: ShelfServer | None = None
        self._warmer: Warmer | None = None

    @property
    def fingerprint(self) -> str:
        """Of the weights that are here; "" for none."""
        return self._held.model.weights if self._held is not None else ""

    def hold(self, spec: ReplicaSpec, mesh: Mesh, sources: Sequence[str], report: Report) -> Held:
        """The weights for `spec`: those that are here, if they fit; else those whose load was interrupted, with what
        they lack. `sources`: addresses of ranks that hold weights of the same model. Raises Rejected, Interrupted."""
        wanted = fingerprint(spec, mesh)
        if self._held is not None and self._held.model.weights == wanted:
            self._held.model = self._held.model.attach(mesh)
            return self._held
        self._drop()
        if self._begun is not None and self._begun.weights != wanted:
            self._begun = None
        load, self._begun = self._begun, None
        if load is None:
            load = begin_load(spec, mesh, self._device, lambda stage, share: report(stage, BUILD_SHARE * share))
        try:
            model = load.run(lambda stage, share: report(stage, BUILD_SHARE + (1 - BUILD_SHARE) * share), sources)
        except Interrupted:
            self._begun = load
            raise
        self._held = Held(model.attach(mesh), spec)
        return self._held

    def warm(self, spec: ReplicaSpec) -> None:
        """Have the system read the rest of the model's files where its memory has room to spare."""
        if self._warmer is not None:
            self._warmer.stop()
        files = model_files(spec)
        if sum(path.stat().st_size for path in files) < WARM_SHARE * available_bytes():
            self._warmer = Warmer(files)

    def hide(self) -> None:
        """Let nobody copy: what a GPU captures must not meet a copy."""
        if self._server is not None:
            self._server.show(None)

    def show(self, spec: ReplicaSpec, host: str) -> None:
        """Let others copy what is held, at an address on `host`, and tell of it."""
        held = self._held
        assert held is not None, "what is shown is held"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        address = self._serve(held.model, host)
        mesh = held.model.mesh
        self._told(
            HeldWeights(
                deployment=spec.deployment,
                degrees=spec.degrees,
                rank=mesh.rank,
                fingerprint=held.model.weights,
                address=address,
            )
        )

    def _serve(self, model: FittedModel, host: str) -> str:
        try:
            self._server = self._server or ShelfServer(host, self._device)
        except OSError as error:
            # Others then read files.
            _log.warning("weights_not_served", host=host, error=str(error))
            return ""
        self._server.show(model.shelf)
        return self._server.address

    def _drop(self) -> None:
        self.hide()
        if self._held is not None:
            self._held = None
            self._told(None)
