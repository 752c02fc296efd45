"""`perdure worker`: one node's worker daemon."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import structlog
import typer
import uvloop

from controlplane.runtime.clock import SystemClock
from controlplane.runtime.errors import PerdureError
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.telemetry import configure_logging
from dataplane.config import WorkerConfig, WorkerFlags, resolve
from dataplane.daemon import WorkerDaemon
from dataplane.devices import CPU_RANKS
from dataplane.rank_pool import PoolSettings
from dataplane.zygote_link import ZygoteLost

EXIT_REFUSED = 2
EXIT_BROKEN = 1

log = structlog.get_logger()


def worker_command(
    etcd: Annotated[str, typer.Option(help="host:port of etcd, several with commas between them.")] = "",
    node: Annotated[str, typer.Option(help="This node's name in the cluster.")] = "",
    cluster: Annotated[str, typer.Option(help="The cluster's name.  [default: local]")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on and to be reached at.  [default: 127.0.0.1]")] = "",
    port: Annotated[int | None, typer.Option(help="gRPC port.  [default: a free one]")] = None,
    devices: Annotated[str, typer.Option(help="cpu:0,cpu:1 or cuda:0,… or auto.  [default: auto]")] = "",
    config: Annotated[Path | None, typer.Option(help="The cluster's YAML file; flags win over it.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Folder for logs.  [default: .perdure]")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port for Prometheus' /metrics.")] = None,
    etcd_ca: Annotated[Path | None, typer.Option(help="CA certificate; switches TLS to etcd on.")] = None,
    etcd_cert: Annotated[Path | None, typer.Option(help="Client certificate for etcd.")] = None,
    etcd_key: Annotated[Path | None, typer.Option(help="Key of the client certificate.")] = None,
    etcd_user: Annotated[str, typer.Option(help="etcd user.")] = "",
    etcd_password: Annotated[
        str, typer.Option(help="Password of the etcd user.", envvar="PERDURE_ETCD_PASSWORD", show_envvar=True)
    ] = "",
    log_format: Annotated[str, typer.Option(help="json or text.")] = "text",
) -> None:
    """Run this node's worker daemon. SIGTERM drains it: running streams finish or move, then it goes."""
    flags = WorkerFlags(
        etcd=etcd,
        node=node,
        cluster=cluster,
        host=host,
        port=port,
        devices=devices,
        config=config,
        state_dir=state_dir,
        metrics_port=metrics_port,
        etcd_ca=etcd_ca,
        etcd_cert=etcd_cert,
        etcd_key=etcd_key,
        etcd_user=etcd_user,
        etcd_password=etcd_password,
    )
    if log_format not in ("json", "text"):
        _refuse(f"--log-format {log_format!r}: write json or text")
    try:
        settings = resolve(flags)
    except PerdureError as error:
        _refuse(str(error))
    configure_logging(json_lines=log_format == "json", process="worker", node=settings.node)
    environment = {CPU_RANKS: str(settings.cpu_ranks)}
    pool = PoolSettings(node=settings.node, log_dir=settings.log_dir, environment=environment)
    raise typer.Exit(run_worker(settings, pool))


def run_worker(config: WorkerConfig, pool: PoolSettings) -> int:
    """Run a daemon to its end. Its exit code."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(config, pool))
    except PerdureError as error:
        sys.stderr.write(f"perdure worker: {error}\n")
        return EXIT_REFUSED
    except ZygoteLost as error:
        log.error("worker_failed", error=str(error))
        return EXIT_BROKEN
    return 0


async def _run(config: WorkerConfig, pool: PoolSettings) -> None:
    daemon = WorkerDaemon(config, pool, SystemClock())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        reason = Reason(kind=ReasonKind.ADMIN, text=f"{number.name} received", node=config.node)
        loop.add_signal_handler(number, daemon.stop, reason)
    await daemon.run()


def _refuse(text: str) -> NoReturn:
    sys.stderr.write(f"perdure worker: {text}\n")
    raise typer.Exit(EXIT_REFUSED)


if __name__ == "__main__":
    typer.run(worker_command)
