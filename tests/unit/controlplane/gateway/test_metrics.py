"""Numbers counted aside come out as Prometheus wants them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from controlplane.gateway.metrics import GatewayMetrics, PlainHistogram


def test_buckets_are_cumulative_and_closed_above():
    registry = CollectorRegistry()
    histogram = PlainHistogram("gap_seconds", "Gaps.", (0.1, 1.0))
    registry.register(histogram)
    for value in (0.05, 0.1, 0.5, 9.0):
        histogram.observe(value)
    lines = generate_latest(registry).decode().splitlines()
    assert 'gap_seconds_bucket{le="0.1"} 2.0' in lines
    assert 'gap_seconds_bucket{le="1.0"} 3.0' in lines
    assert 'gap_seconds_bucket{le="+Inf"} 4.0' in lines
    assert "gap_seconds_count 4.0" in lines
    assert "gap_seconds_sum 9.65" in lines


def test_tokens_reach_their_counter_once():
    metrics = GatewayMetrics(CollectorRegistry())
    metrics.tokens_new += 5
    metrics.settle()
    metrics.settle()
    assert "perdure_gateway_tokens_delivered_total 5.0" in generate_latest(metrics.registry).decode()
