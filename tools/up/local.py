"""`perdure up`: the plan of a whole cluster on one machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.config import ClusterConfig
from tools.up.checks import FreePorts, check_and_prepare, cpu_has_bfloat16, cuda_devices
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
    shape = _on_this_machine(options)
    fitted = fit_to_machine(options.config, shape, FreePorts(gateway_ports(options.config, shape)))
    if fitted.model.dtype != options.config.model.dtype:
        display.line(f"Note: this CPU has no bfloat16 arithmetic; using {fitted.model.dtype} (--dtype overrides).")
    config = await check_and_prepare(
        fitted, display, replicas_here=fitted.replicas, etcd_needed=not fitted.cluster.etcd.endpoints
    )
    return plan_local(config, state)


def _on_this_machine(options: UpOptions) -> LocalShape:
    return replace(
        options.shape,
        cuda_devices=cuda_devices(options.device),
        cpu_cores=len(os.sched_getaffinity(0)),
        cpu_bfloat16=cpu_has_bfloat16(Path("/proc/cpuinfo").read_text()),
    )
