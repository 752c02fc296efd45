"""What a rank's exchanges cost, told bit by bit to its daemon, which shows it to Prometheus."""

from __future__ import annotations

from dataclasses import replace

from dataplane.frames import GroupCost
from dataplane.parallel.groups import Cost
from dataplane.parallel.mesh import Mesh

REPORT_INTERVAL_S = 1.0
"""Costs are told at most so often."""


class CostLedger:
    """Remembers what was told of one mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._told: dict[tuple[str, str], Cost] = {}
        self._due = 0.0

    def take(self, now: float) -> tuple[GroupCost, ...]:
        """What came since the last time; nothing if that is less than an interval ago."""
        if now < self._due:
            return ()
        self._due = now + REPORT_INTERVAL_S
        return tuple(
            self._since_told(group, kind, cost)
            for group, costs in self._mesh.costs().items()
            for kind, cost in costs.items()
            if cost.calls > self._told.get((group, kind), Cost()).calls
        )

    def _since_told(self, group: str, kind: str, cost: Cost) -> GroupCost:
        before = self._told.get((group, kind), Cost())
        self._told[group, kind] = replace(cost)
        return GroupCost(
            group=group,
            kind=kind,
            calls=cost.calls - before.calls,
            bytes=cost.bytes - before.bytes,
            seconds=cost.seconds - before.seconds,
        )
