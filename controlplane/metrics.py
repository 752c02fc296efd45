"""What the coordinator counts and measures, for Prometheus. Made of the events that it records, and of nothing else."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from controlplane.core.failure import FailurePhase
from controlplane.core.messages import Recorded

_PHASE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 30, 60, 300)
_PHASES = {f"{phase.name.lower()}_s": phase.name.lower() for phase in FailurePhase}


class CoordinatorMetrics:
    """One set of instruments in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._events = Counter("perdure_events", "Events recorded while leading, by name.", ["name"], registry=registry)
        self._phases = Histogram(
            "perdure_failure_phase_seconds",
            "From the notice of a failure to the end of each phase of its recovery.",
            ["phase"],
            buckets=_PHASE_BUCKETS,
            registry=registry,
        )
        self._gap = Histogram(
            "perdure_failure_gap_seconds",
            "Longest time between two tokens of a request that a failure hit.",
            buckets=_PHASE_BUCKETS,
            registry=registry,
        )

    def happened(self, event: Recorded) -> None:
        """Count the event; the end of a recovery carries its whole timeline."""
        self._events.labels(event.name).inc()
        if event.name != "failure_recovered":
            return
        for key, phase in _PHASES.items():
            if key in event.details:
                self._phases.labels(phase).observe(float(event.details[key]))
        if gap_ms := int(event.details["gap_ms_max"]):
            self._gap.observe(gap_ms / 1000)
