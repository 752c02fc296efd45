"""`perdure chaos`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from controlplane.config import ClusterConfig
from tools.chaos.live import ChaosError, LiveCluster
from tools.chaos.plan import PlanError, read_plan
from tools.chaos.report import write_report
from tools.chaos.rounds import Result, run_plan
from tools.ctl.client import CtlError, find_addresses
from tools.up.state import StateDir, default_state_dir

CORE_PLAN = Path(__file__).parent / "plans" / "core.yaml"
EXIT_FAILED = 1
EXIT_REFUSED = 2


def chaos_command(
    plan: Annotated[Path, typer.Argument(help="YAML file of faults. Default: the core faults.")] = CORE_PLAN,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of control planes (with commas). Default: the cluster of `perdure up` here."),
    ] = None,
    report: Annotated[Path, typer.Option(help="Folder for report.md and timeline.png.")] = Path("chaos-report"),
) -> None:
    """Kill, stop and drain parts of a live cluster while streams run, and compare them with an undisturbed run.

    Exit code 1 if a stream or a new request was hurt. Never point it at a cluster that serves anybody.
    """
    try:
        result = asyncio.run(_run(plan, address))
    except (ChaosError, CtlError, PlanError) as error:
        typer.echo(f"perdure chaos: {error}", err=True)
        raise typer.Exit(EXIT_REFUSED) from error
    typer.echo(f"report: {write_report(result, report)}")
    if not all(outcome.passed for outcome in result.rounds):
        raise typer.Exit(EXIT_FAILED)


async def _run(path: Path, address: str | None) -> Result:
    plan = read_plan(path)
    addresses = find_addresses(address)
    local = None if address else StateDir(default_state_dir(ClusterConfig.from_flags().cluster.name)).running()
    cluster = LiveCluster(addresses, local)
    urls = [gateway.url for gateway in (await cluster.status()).gateways]
    return await run_plan(plan, cluster, urls, typer.echo)
