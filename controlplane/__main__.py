"""`perdure controlplane`: run one control-plane process."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Annotated, Literal

import typer
import uvloop

from controlplane.config import ClusterConfig, ControlPlaneConfig, EtcdConfig
from controlplane.config_source import ConfigError, Problem
from controlplane.process import ProcessOptions, Role, run_process
from controlplane.runtime.errors import PerdureError, invalid
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.records import DeploymentRecord
from controlplane.runtime.telemetry import configure_logging

WILDCARDS = ("0.0.0.0", "::")


def controlplane_command(
    config: Annotated[Path | None, typer.Option(help="Cluster configuration (YAML).", show_default=False)] = None,
    etcd: Annotated[
        str | None, typer.Option(help="etcd endpoints: HOST:PORT[,HOST:PORT…].", show_default=False)
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="Name of the cluster.", show_default=False)] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of this process (default: host name).", show_default=False)
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (default: 127.0.0.1).", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="gRPC port (default: 7700).", show_default=False)
    ] = None,
    http_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="HTTP port (default: 8000).", show_default=False)
    ] = None,
    advertise_host: Annotated[
        str | None, typer.Option(help="Host by which others reach this process (default: --host).", show_default=False)
    ] = None,
    role: Annotated[Role, typer.Option(help="What this process does besides answering Admin.")] = Role.BOTH,
    state_dir: Annotated[
        Path | None, typer.Option(help="Folder for the event log (default: none is kept).", show_default=False)
    ] = None,
    etcd_user: Annotated[str | None, typer.Option(help="etcd user.", show_default=False)] = None,
    etcd_password_file: Annotated[
        Path | None, typer.Option(help="File with the etcd user's password.", show_default=False)
    ] = None,
    etcd_ca: Annotated[Path | None, typer.Option(help="etcd's CA certificate (PEM).", show_default=False)] = None,
    etcd_cert: Annotated[
        Path | None, typer.Option(help="Client certificate for etcd (PEM).", show_default=False)
    ] = None,
    etcd_key: Annotated[Path | None, typer.Option(help="Client key for etcd (PEM).", show_default=False)] = None,
    log_format: Annotated[Literal["json", "text"], typer.Option(help="How to write the log.")] = "text",
) -> None:
    """Run one control-plane process: a candidate coordinator, the admin service and a gateway.

    Flags win over --config. Runs until SIGTERM or Ctrl-C.
    """
    try:
        settings = ClusterConfig.load(config) if config is not None else ClusterConfig.from_flags()
        ours = name or socket.gethostname()
        section = next((entry for entry in settings.cluster.controlplanes if entry.name == ours), ControlPlaneConfig())
        listen = host or section.host
        options = ProcessOptions(
            name=ours,
            cluster_name=cluster or settings.cluster.name,
            etcd=_etcd_options(
                settings.cluster.etcd, etcd, etcd_user, etcd_password_file, etcd_ca, etcd_cert, etcd_key
            ),
            timings=settings.timings(),
            host=listen,
            port=section.port if port is None else port,
            advertised_host=advertise_host or (socket.getfqdn() if listen in WILDCARDS else listen),
            http_host=listen,
            http_port=section.http_port if http_port is None else http_port,
            role=role,
            deployment=_deployment(settings, config) if config is not None and role is not Role.GATEWAY else None,
            state_dir=state_dir,
        )
        configure_logging(json_lines=log_format == "json", process=ours)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run_process(options))
    except (ConfigError, PerdureError) as error:
        typer.echo(f"perdure controlplane: {error}", err=True)
        raise typer.Exit(1) from error


def _deployment(settings: ClusterConfig, file: Path) -> DeploymentRecord:
    """What the file describes, with its model's folder: gateways read the tokenizer there, and know neither names nor
    this command's working directory. A path of other hosts is taken as it is. Raises ConfigError for what is no folder,
    as making one takes what only workers have installed."""
    path = Path(settings.model.path).expanduser()
    if path.suffix != ".gguf":
        if path.is_absolute():
            return settings.with_model(path, settings.model_name).deployment()
        if (path / "config.json").is_file():
            return settings.with_model(path.resolve(), settings.model_name).deployment()
    text = (
        f"{settings.model.path!r} is no model folder: name one, as `perdure up` and `perdure ctl apply` alone "
        "make folders of names and .gguf files"
    )
    raise ConfigError([Problem(str(file), "model.path", text)])


def _etcd_options(
    section: EtcdConfig,
    endpoints: str | None,
    user: str | None,
    password_file: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
) -> EtcdOptions:
    """Where etcd is, by flags first. Raises Rejected if nobody says it or a file cannot be read."""
    addresses = tuple(endpoints.split(",")) if endpoints else tuple(section.endpoints)
    if not addresses:
        raise invalid("no etcd endpoint: give --etcd HOST:PORT or cluster.etcd.endpoints in --config")
    secret = password_file or _path(section.password_file)
    try:
        password = secret.read_text().strip() if secret is not None else ""
    except OSError as error:
        raise invalid(f"etcd password file {secret}: {error.strerror}") from error
    return EtcdOptions(
        endpoints=addresses,
        user=user or section.username,
        password=password,
        ca=ca or _path(section.ca_file),
        cert=cert or _path(section.cert_file),
        key=key or _path(section.key_file),
    )


def _path(text: str) -> Path | None:
    return Path(text) if text else None


if __name__ == "__main__":
    typer.run(controlplane_command)
