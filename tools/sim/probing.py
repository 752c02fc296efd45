"""Proof of death as a shell makes it: two raw connects, a gap apart, both refused."""

from __future__ import annotations

from controlplane.runtime import probe
from controlplane.runtime.timing import Timings
from tools.sim.network import Network
from tools.sim.process import Process


async def refused_twice(process: Process, network: Network, address: str, timings: Timings) -> bool:
    """As controlplane.runtime.probe's, in the modelled network."""
    for attempt in range(probe.CONNECTS):
        if attempt:
            await process.sleep(timings.probe_gap)
        refused = network.probe(process, address)
        if await process.first(refused, timeout=timings.probe_connect) < 0 or not refused.value:
            return False
    return True
