"""What exchanges cost is told once, in parts."""

from __future__ import annotations

from controlplane.runtime.messages.common import ParallelDegrees
from dataplane.frames import GroupCost
from dataplane.parallel.costs import REPORT_INTERVAL_S, CostLedger
from dataplane.parallel.groups import Cost
from dataplane.parallel.mesh import plan_mesh


def test_each_cost_is_told_once_and_at_most_once_an_interval() -> None:
    mesh = plan_mesh(ParallelDegrees(tensor=2), 0)
    ledger = CostLedger(mesh)
    assert ledger.take(0.0) == ()
    cost = mesh.tensor.costs["all_reduce"] = Cost(2, 20, 0.25)
    mesh.control.costs["broadcast"] = Cost(1, 8, 0.0)
    assert ledger.take(REPORT_INTERVAL_S / 2) == ()
    first = ledger.take(REPORT_INTERVAL_S)
    assert first == (GroupCost("control", "broadcast", 1, 8, 0.0), GroupCost("tensor", "all_reduce", 2, 20, 0.25))
    cost.calls, cost.bytes, cost.seconds = 5, 50, 1.0
    assert ledger.take(2 * REPORT_INTERVAL_S) == (GroupCost("tensor", "all_reduce", 3, 30, 0.75),)
    assert ledger.take(3 * REPORT_INTERVAL_S) == ()
