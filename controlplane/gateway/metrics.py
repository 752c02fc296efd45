"""What the gateway counts and measures, for Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from controlplane.runtime.clock import Clock

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_GAP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_LENGTH_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class GatewayMetrics:
    """One set of instruments in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter("perdure_gateway_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self.http_responses = Counter(
            "perdure_gateway_http_responses",
            "HTTP responses by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self.tokens = Counter("perdure_gateway_tokens_delivered", "Tokens delivered to clients.", registry=registry)
        # What is counted per token is a plain number, moved to its instrument when someone looks.
        self.tokens_new = 0
        self.prompt_tokens = Counter("perdure_gateway_prompt_tokens", "Prompt tokens accepted.", registry=registry)
        self.moves = Counter(
            "perdure_gateway_replays", "Attempts after the first, by kind.", ["kind"], registry=registry
        )
        self.dropped = Counter(
            "perdure_gateway_dropped",
            "Tokens and frames that the delivery rule or a fence dropped.",
            ["what"],
            registry=registry,
        )
        self.ttft = Histogram(
            "perdure_gateway_time_to_first_token_seconds",
            "From acceptance to the first token.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.gap = PlainHistogram(
            "perdure_gateway_inter_token_seconds", "Between two deliveries of one request.", _GAP_BUCKETS
        )
        registry.register(self.gap)
        self.prompt_length = Histogram(
            "perdure_gateway_prompt_length_tokens", "Prompt lengths.", buckets=_LENGTH_BUCKETS, registry=registry
        )
        self.journals = Gauge("perdure_gateway_journals", "Open journals by phase.", ["phase"], registry=registry)
        self.journal_tokens = Gauge("perdure_gateway_journal_tokens", "Tokens held in journals.", registry=registry)
        self.workers = Gauge("perdure_gateway_worker_streams", "Worker streams by state.", ["state"], registry=registry)
        self.leader = Gauge("perdure_gateway_leader_term", "Term of the leader session, 0 without.", registry=registry)

    def settle(self) -> None:
        """Move what was counted aside to its instruments."""
        self.tokens.inc(self.tokens_new)
        self.tokens_new = 0


class PlainHistogram(Collector):
    """A histogram whose `observe` costs a bisection: prometheus_client's own takes a lock per observation."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Cumulative buckets, as the exposition format wants them."""
        total, buckets = 0, list[tuple[str, float]]()
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((str(bound), total))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


class RequestClock:
    """Times of one journal's deliveries."""

    def __init__(self, metrics: GatewayMetrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock
        self._last = clock.now()
        self.first_token_at: float | None = None

    def delivered(self, tokens: int) -> None:
        """`tokens` came at once."""
        if not tokens:
            return
        now = self._clock.now()
        if self.first_token_at is None:
            self.first_token_at = now
            self._metrics.ttft.observe(now - self._last)
        else:
            self._metrics.gap.observe(now - self._last)
        self._last = now
        self._metrics.tokens_new += tokens
