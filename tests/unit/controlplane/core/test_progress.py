"""A replica without progress is closed in time, though ticks are never exactly an interval apart."""

from __future__ import annotations

import pytest

from controlplane.core.messages import Tick
from controlplane.runtime.messages.common import ReasonKind
from controlplane.runtime.messages.session import Heartbeat, ReplicaLoad
from tests.scenario.coordinator.peers import TIMINGS
from tests.unit.controlplane.core.test_failures import one, serving


@pytest.mark.parametrize("late_s", [-0.003, 0.0, 0.003, 0.2])
def test_a_hang_is_noticed_within_its_deadline(late_s: float) -> None:
    cluster, _, (worker,) = serving(1)
    (replica,) = cluster.state.replicas.values()
    load = ReplicaLoad(replica=replica.replica, epoch=replica.epoch, free_blocks=900, running=4, waiting=0, progress=7)
    begun = cluster.now
    while not cluster.state.failures.records:
        assert cluster.now - begun < TIMINGS.progress_deadline + 4 * TIMINGS.heartbeat_interval
        cluster.say(worker, Heartbeat(uptime_ms=round(cluster.now * 1000), replicas=(load,)))
        cluster.now += TIMINGS.heartbeat_interval + late_s
        cluster.step(Tick())
    assert one(cluster).reason.kind is ReasonKind.NO_PROGRESS
