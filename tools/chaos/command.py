"""`perdure chaos`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from controlplane.config import DEMO_MODEL, ClusterConfig
from controlplane.runtime.errors import PerdureError
from tools.chaos.fault import Action
from tools.chaos.hosts import Hosts, HostsError
from tools.chaos.live import ChaosError, LiveCluster
from tools.chaos.network import NetworkError, enter_namespaces
from tools.chaos.plan import Plan, PlanError, pick, read_plans
from tools.chaos.report import REPORT, write_report
from tools.chaos.rounds import Result, run_plan
from tools.ctl.client import CtlError, find_addresses
from tools.up.display import display_for_stdout
from tools.up.prepare import ModelMissing, prepare_model
from tools.up.state import StateDir, default_state_dir

PLANS = Path(__file__).parent / "plans"
CORE_PLAN = PLANS / "core.yaml"
FULL_PLAN = PLANS / "full.yaml"
EXIT_FAILED = 1
EXIT_REFUSED = 2

REFUSALS = (ChaosError, CtlError, PlanError, HostsError, NetworkError, ModelMissing, PerdureError)


def chaos_command(
    plan: Annotated[Path, typer.Argument(help="YAML file of faults. Default: the core faults.")] = CORE_PLAN,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of control planes (with commas). Default: the cluster of `perdure up` here."),
    ] = None,
    report: Annotated[Path, typer.Option(help="Folder for report.md and its pictures.")] = Path("chaos-report"),
    only: Annotated[
        list[str] | None, typer.Option(help="Only rounds whose name contains this. May be given again.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="What a plan with hosts serves.", show_default="the demo model")
    ] = DEMO_MODEL,
) -> None:
    """Break parts of a live cluster while streams run, and compare every stream with an undisturbed run.

    A plan with hosts (tools/chaos/plans/full.yaml) starts a cluster of its own over network namespaces of this
    machine, which takes root. Exit code 1 if a stream or a new request was hurt, or the cluster did not become whole
    again. Never point it at a cluster that serves anybody.
    """
    try:
        plans = pick(read_plans(plan), only) if only else read_plans(plan)
        results = (
            _run_here(plans[0], address, report) if plans[0].hosts is None else _run_over_hosts(plans, model, report)
        )
    except REFUSALS as error:
        typer.echo(f"perdure chaos: {error}", err=True)
        raise typer.Exit(EXIT_REFUSED) from error
    typer.echo(f"report: {report / REPORT}")
    if not all(outcome.passed for result in results for outcome in result.rounds):
        raise typer.Exit(EXIT_FAILED)


def _run_here(plan: Plan, address: str | None, report: Path) -> list[Result]:
    addresses = find_addresses(address)
    local = None if address else StateDir(default_state_dir(ClusterConfig.from_flags().cluster.name)).running()
    cluster = LiveCluster(addresses, local)

    async def run() -> Result:
        urls = [gateway.url for gateway in (await cluster.status()).gateways]
        return await run_plan(plan, cluster, None, urls, typer.echo, lambda result: write_report([result], report))

    return [asyncio.run(run())]


def _run_over_hosts(plans: list[Plan], model: str, report: Path) -> list[Result]:
    """One cluster after the other."""
    folder = asyncio.run(prepare_model(model, display_for_stdout()))
    enter_namespaces()
    results: list[Result] = []
    for number, plan in enumerate(plans):
        logs = report / "logs" / str(number + 1)
        if plan.name:
            typer.echo(f"{plan.name}:")
        save = partial(_save, results, report)
        results.append(asyncio.run(_run_on_own_cluster(plan, folder, logs, save)))
    return results


def _save(before: list[Result], report: Path, result: Result) -> None:
    write_report([*before, result], report)


async def _run_on_own_cluster(plan: Plan, model: Path, logs: Path, save: Callable[[Result], None]) -> Result:
    assert plan.hosts is not None
    clock = any(fault.action is Action.JUMP for part in plan.rounds for fault in part.faults)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        hosts = Hosts(plan.hosts, model, Path(folder), logs, clock=clock)
        try:
            await hosts.start()
            cluster = LiveCluster(hosts.addresses, nodes=plan.hosts.workers)
            return await run_plan(plan, cluster, hosts, hosts.urls, typer.echo, save)
        finally:
            await hosts.stop()
