"""`perdure up`: the plan of a whole cluster on one machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from controlplane.config import ClusterConfig
from tools.up.checks import FreePorts, check_and_prepare, cuda_devices
from tools.up.display import Display
from tools.up.plan import ClusterPlan, LocalShape, fit_to_machine, gateway_ports, plan_local
from tools.up.state import StateDir


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line says."""

    config: ClusterConfig
    shape: LocalShape
    # "auto", "cpu" or "cuda".
    device: str


async def plan_up(options: UpOptions, state: StateDir, display: Display) -> ClusterPlan:
    """Check this machine, prepare the model, and say what to start. Raises ConfigError and what the checks raise."""
    shape = replace(options.shape, cuda_devices=cuda_devices(options.device), cpu_cores=len(os.sched_getaffinity(0)))
    fitted = fit_to_machine(options.config, shape, FreePorts(gateway_ports(options.config, shape)))
    config = await check_and_prepare(
        fitted, display, replicas_here=fitted.replicas, etcd_needed=not fitted.cluster.etcd.endpoints
    )
    return plan_local(config, state)
