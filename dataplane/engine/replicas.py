"""The replicas of a mesh as one engine: a batch is spread over them, the answers are gathered in its order.

For an engine without a cluster: every rank of the mesh makes a `Replicas` and calls the same methods. The cluster's
coordinator spreads requests itself, one by one, over replicas that are meshes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from controlplane.runtime.messages.common import ReplicaSpec
from dataplane.engine.engine import Engine
from dataplane.engine.follower import Follower
from dataplane.engine.library import Generated, generate
from dataplane.engine.setup import Report, meet
from dataplane.frames import Submission
from dataplane.models.fit import FittedModel
from dataplane.parallel.collectives import broadcast_data
from dataplane.parallel.data import gather_data, scatter_data


class Replicas:
    """One rank's share in all replicas of a mesh. Not thread-safe."""

    def __init__(
        self, model: FittedModel, spec: ReplicaSpec, device: torch.device, report: Report = lambda *_: None
    ) -> None:
        """All ranks of the mesh together; see Engine."""
        self._mesh = model.mesh
        self.engine: Engine | Follower = (
            Engine(model, spec, device, report=report)
            if self._mesh.is_driver
            else Follower(model, spec, device, None, report)
        )

    def generate(self, submissions: Sequence[Submission] = ()) -> list[Generated] | None:
        """Run rank 0's `submissions`; those of other ranks do not count. The answers, in their order, on every rank.

        None: rank 0 closed instead. Ranks other than 0 wait for it without a limit. Raises PeerLost when one dies.
        """
        engine = self.engine
        if isinstance(engine, Engine):
            return self._drive(engine, submissions)
        engine.run()
        # The other replicas may take longer.
        return broadcast_data(self._mesh.control, None, 0, list[Generated] | None, patient=True)

    def close(self) -> None:
        """On rank 0: let the other ranks' `generate` return None. On others: wait for that."""
        if self._mesh.rank == 0:
            broadcast_data(self._mesh.data, False, 0)
            self._release(None)
        else:
            while self.generate() is not None:
                pass

    def _drive(self, engine: Engine, submissions: Sequence[Submission]) -> list[Generated] | None:
        """What the driver of a replica does: its part of the batch."""
        data = self._mesh.data
        if not broadcast_data(data, True, 0, patient=True):
            return self._release(None)
        part: list[Submission] = scatter_data(data, list(submissions), 0, Submission)
        own = generate(engine, part)
        meet(data)
        return self._release(gather_data(data, own, Generated))

    def _release(self, answers: list[Generated] | None) -> list[Generated] | None:
        """End the followers' wait for plans, and tell them the answers."""
        assert isinstance(self.engine, Engine), "drivers have followers"
        self.engine.close()
        return broadcast_data(self._mesh.control, answers, 0, list[Generated] | None)
