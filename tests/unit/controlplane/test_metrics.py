"""The coordinator's instruments."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from controlplane.core.messages import Recorded
from controlplane.metrics import CoordinatorMetrics


def test_a_recoverys_timeline_becomes_histograms_by_phase():
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    details = {"requests": "16", "gap_ms_max": "240", "closed_s": "0.001", "first_token_s": "0.120"}
    metrics.happened(Recorded("failure_recovered", details=details))
    metrics.happened(Recorded("replica_ready"))

    def phase(name: str) -> float | None:
        return registry.get_sample_value("perdure_failure_phase_seconds_sum", {"phase": name})

    assert (phase("closed"), phase("first_token"), phase("regrouped")) == (0.001, 0.12, None)
    assert registry.get_sample_value("perdure_failure_gap_seconds_sum") == 0.24
    assert registry.get_sample_value("perdure_events_total", {"name": "replica_ready"}) == 1
