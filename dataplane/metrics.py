"""What a worker daemon shows to Prometheus. Updated on the event loop, served from the client library's thread."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from controlplane.runtime.messages.common import RankPhase
from dataplane.core.state import ExchangeCost, WorkerState


class WorkerMetrics:
    """One daemon's figures, in a registry of their own."""

    def __init__(self, node: str) -> None:
        registry = self._registry = CollectorRegistry()
        self._node = node
        self._events = Counter("perdure_worker_events", "What happened.", ["node", "event"], registry=registry)
        self._tokens = Counter("perdure_worker_tokens_sent", "Tokens sent to gateways.", ["node"], registry=registry)
        self._fenced = Counter(
            "perdure_worker_fenced_frames",
            "Frames refused for their term, epoch or attempt.",
            ["node", "frame"],
            registry=registry,
        )
        self._ranks = Gauge("perdure_worker_ranks", "Rank processes by phase.", ["node", "phase"], registry=registry)
        self._sequences = Gauge("perdure_worker_sequences", "Sequences admitted.", ["node"], registry=registry)
        self._shadows = Gauge("perdure_worker_shadows", "Requests remembered.", ["node"], registry=registry)
        self._streams = Gauge("perdure_worker_gateway_streams", "Gateways connected.", ["node"], registry=registry)
        self._term = Gauge("perdure_worker_highest_term", "Highest term met.", ["node"], registry=registry)
        self._session = Gauge(
            "perdure_worker_session_live", "1 with a live leader session.", ["node"], registry=registry
        )
        self._lag = Gauge("perdure_worker_loop_lag_seconds", "How late the loop ran.", ["node"], registry=registry)
        labels = ["node", "device", "group", "exchange"]
        self._exchanges = Counter("perdure_rank_exchanges", "Exchanges between ranks.", labels, registry=registry)
        self._exchanged = Counter("perdure_rank_exchange_bytes", "Bytes given into them.", labels, registry=registry)
        self._exchanging = Counter(
            "perdure_rank_exchange_seconds",
            "Time in them, waiting for peers included, waiting for work not.",
            labels,
            registry=registry,
        )
        self._fenced_seen: Tally[str] = Tally()
        self._costs_seen: dict[tuple[str, str, str], ExchangeCost] = {}

    def serve(self, host: str, port: int) -> None:
        """Answer on http://host:port/metrics. Raises OSError."""
        start_http_server(port, host, self._registry)

    def happened(self, event: str) -> None:
        self._events.labels(self._node, event).inc()

    def sent_tokens(self, count: int) -> None:
        self._tokens.labels(self._node).inc(count)

    def update(self, state: WorkerState) -> None:
        """Take the figures of the moment."""
        for frame, count in state.fenced.items():
            self._fenced.labels(self._node, frame).inc(count - self._fenced_seen[frame])
        self._fenced_seen = state.fenced.copy()
        phases = Tally(rank.phase for rank in state.ranks.values())
        for phase in RankPhase:
            self._ranks.labels(self._node, phase.name.lower()).set(phases[phase])
        self._sequences.labels(self._node).set(len(state.sequences))
        self._shadows.labels(self._node).set(len(state.requests))
        self._streams.labels(self._node).set(len(state.streams))
        self._term.labels(self._node).set(state.highest_term)
        self._session.labels(self._node).set(state.leader is not None and state.leader.session is not None)
        self._lag.labels(self._node).set(state.loop_lag)
        for key, cost in state.exchanges.items():
            self._count_exchanges(key, cost)

    def _count_exchanges(self, key: tuple[str, str, str], cost: ExchangeCost) -> None:
        seen = self._costs_seen.get(key, ExchangeCost())
        self._costs_seen[key] = replace(cost)
        self._exchanges.labels(self._node, *key).inc(cost.calls - seen.calls)
        self._exchanged.labels(self._node, *key).inc(cost.bytes - seen.bytes)
        self._exchanging.labels(self._node, *key).inc(cost.seconds - seen.seconds)
