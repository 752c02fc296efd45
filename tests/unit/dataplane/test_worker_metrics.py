"""What Prometheus reads from a worker."""

from __future__ import annotations

from urllib.request import urlopen

from controlplane.runtime.ids import Epoch
from dataplane import frames
from dataplane.metrics import WorkerMetrics
from tests.scenario.worker.model import serving
from tests.support.cluster import free_port


def test_the_state_and_what_happened_are_served() -> None:
    worker = serving()
    worker.open("g", "a", choices=2)
    worker.open("g", "b", epoch=7)
    metrics = WorkerMetrics("w1")
    metrics.happened("rank_exited")
    metrics.sent_tokens(5)
    metrics.update(worker.state)
    worker.open("g", "c", epoch=7)
    costs = (frames.GroupCost(group="tensor", kind="all_reduce", calls=3, bytes=300, seconds=0.5),)
    for _ in range(2):
        worker.says("cpu:0", frames.GroupCosts(epoch=Epoch(1), costs=costs))
        metrics.update(worker.state)
    port = free_port()
    metrics.serve("127.0.0.1", port)
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    for expected in (
        'perdure_worker_sequences{node="w1"} 2.0',
        'perdure_worker_ranks{node="w1",phase="serving"} 1.0',
        'perdure_worker_session_live{node="w1"} 1.0',
        'perdure_worker_tokens_sent_total{node="w1"} 5.0',
        'perdure_worker_events_total{event="rank_exited",node="w1"} 1.0',
        'perdure_worker_fenced_frames_total{frame="OpenRequest",node="w1"} 2.0',
        'perdure_rank_exchanges_total{device="cpu:0",exchange="all_reduce",group="tensor",node="w1"} 6.0',
        'perdure_rank_exchange_bytes_total{device="cpu:0",exchange="all_reduce",group="tensor",node="w1"} 600.0',
        'perdure_rank_exchange_seconds_total{device="cpu:0",exchange="all_reduce",group="tensor",node="w1"} 1.0',
    ):
        assert expected in lines
