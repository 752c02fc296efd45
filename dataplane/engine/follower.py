"""A rank of a replica that is not its driver: it runs the plans that the driver spreads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import Capacity, ReplicaSpec
from dataplane.engine.plan import StepPlan
from dataplane.engine.setup import Report, capacity, set_up
from dataplane.models.fit import FittedModel
from dataplane.parallel.collectives import broadcast_data
from dataplane.progress import ProgressPage


class Follower:
    """The driver's Engine, seen from another rank."""

    def __init__(
        self,
        model: FittedModel,
        spec: ReplicaSpec,
        device: torch.device,
        page: ProgressPage | None,
        report: Report,
    ) -> None:
        """See Engine; all ranks together."""
        ready = set_up(model, spec, device, page, report)
        self._runner = ready.runner
        self._limits = ready.limits
        self._facts = ready.facts
        self._page = page

    @property
    def settled(self) -> list[int]:
        """See ModelRunner."""
        return self._runner.settled

    @property
    def capacity(self) -> Capacity:
        return capacity(self._limits, self._facts)

    def leave(self) -> None:
        """See Engine."""
        self.reset(Epoch(0))
        self._runner.leave()

    def attach(self, model: FittedModel, report: Report) -> None:
        """See Engine."""
        self._runner.attach(model, lambda share: report("capture", share))

    def reset(self, epoch: Epoch) -> None:
        """Nothing is kept between steps: what is cached is the driver's to know."""
        self._mark(0)

    def step(self) -> bool:
        """Wait for the next plan, without a limit, and run it. False: the driver closed its engine.

        Raises PeerLost when the epoch is over.
        """
        plan = broadcast_data(self._runner.mesh.control, None, 0, StepPlan | None, patient=True)
        if plan is None:
            return False
        self._mark(plan.number)
        self._runner.launch(plan)
        self._mark(0)
        return True

    def run(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Follow until the driver closes its engine."""
        while self.step():
            after_step()

    def _mark(self, step: int) -> None:
        if self._page is not None:
            self._page.set_step(step)
            self._page.advance()
