"""The commands of `perdure ctl`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from controlplane.config import ClusterConfig
from controlplane.config_source import ConfigError
from controlplane.runtime.codec import Codec
from controlplane.runtime.records import DeploymentRecord
from protos.perdure.v1 import admin_pb2
from tools.ctl import tables, views
from tools.ctl.client import CALL_TIMEOUT_S, CtlError, admin, find_addresses
from tools.ctl.rollout import Restart, restart
from tools.up.display import display_for_stderr
from tools.up.prepare import ModelMissing, prepare_model

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Address = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of a control plane's gRPC server (several with commas). "
        "Default: $PERDURE_ADDRESS, or the cluster that `perdure up` runs on this machine."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def status(address: Address = None, json: Json = False) -> None:
    """The whole cluster: leader, deployments, nodes with their ranks, replicas, gateways."""
    _show_status(address, json, views.status_view, tables.status_tables)


@app.command()
def nodes(address: Address = None, json: Json = False) -> None:
    """Nodes and their ranks."""
    _show_status(address, json, views.nodes_view, tables.nodes_table)


@app.command()
def replicas(address: Address = None, json: Json = False) -> None:
    """Replicas: state, epoch, load."""
    _show_status(address, json, views.replicas_view, tables.replicas_table)


@app.command()
def requests(address: Address = None, json: Json = False) -> None:
    """Requests that are queued or run."""
    with _one_line_errors(), admin(find_addresses(address)) as stub:
        rows = views.requests_view(stub.ListRequests(admin_pb2.ListRequestsRequest(), timeout=CALL_TIMEOUT_S))
    _print(rows, json, tables.requests_table)


@app.command()
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones until Ctrl-C.")] = False,
    last: Annotated[int, typer.Option(min=0, help="Begin with this many past ones; 0: all that are kept.")] = 50,
    own: Annotated[
        bool,
        typer.Option("--own", help="Those of the control plane at --address, from when it led: a leader's last words."),
    ] = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """What happened, when and why. With --json one object a line."""
    request = admin_pb2.EventsRequest(follow=follow, last=last, own=own)
    with _one_line_errors(), admin(find_addresses(address)) as stub:
        for event in stub.Events(request, timeout=None if follow else CALL_TIMEOUT_S):
            row = views.event_view(event)
            if json:
                print(_json(row, indent=None), flush=True)
            else:
                tables.show(tables.event_line(row))


@app.command()
def failures(address: Address = None, json: Json = False) -> None:
    """What failed since the leader was elected, and how long each step of recovery took."""
    with _one_line_errors(), admin(find_addresses(address)) as stub:
        rows = views.failures_view(stub.ListFailures(admin_pb2.ListFailuresRequest(), timeout=CALL_TIMEOUT_S))
    _print(rows, json, tables.failures_table)


@app.command()
def drain(
    node: str,
    deadline: Annotated[float, typer.Option(min=0, help="Seconds after which running streams move; 0: default.")] = 0,
    address: Address = None,
    json: Json = False,
) -> None:
    """Give a node no new work; its running streams finish, or move at the deadline."""
    request = admin_pb2.DrainRequest(node=node, deadline_ms=round(deadline * 1000))
    with _one_line_errors(), admin(find_addresses(address)) as stub:
        response = stub.Drain(request, timeout=CALL_TIMEOUT_S)
    _print({"node": node, "state": views.enum_word(response, "phase")}, json, _node_line)


@app.command()
def undrain(node: str, address: Address = None, json: Json = False) -> None:
    """Give a drained node work again."""
    with _one_line_errors(), admin(find_addresses(address)) as stub:
        response = stub.Undrain(admin_pb2.UndrainRequest(node=node), timeout=CALL_TIMEOUT_S)
    _print({"node": node, "state": views.enum_word(response, "phase")}, json, _node_line)


@app.command()
def cancel(request: str, address: Address = None, json: Json = False) -> None:
    """End a request; its client gets an error."""
    with _one_line_errors(), admin(find_addresses(address)) as stub:
        stub.Cancel(admin_pb2.CancelRequestRequest(request=request), timeout=CALL_TIMEOUT_S)
    _print({"request": request, "cancelled": True}, json, lambda row: f"{row['request']}: cancelled")


@app.command()
def apply(
    file: Annotated[Path, typer.Option("--file", "-f", help="The cluster's YAML file.")],
    address: Address = None,
    json: Json = False,
) -> None:
    """Make the deployments that a file describes the desired state, one for each of its documents (parted by ---)."""
    codec = Codec(DeploymentRecord, admin_pb2.DeploymentSpec)
    with _one_line_errors():
        for deployment in [_with_folder(config).deployment() for config in ClusterConfig.load_all(file)]:
            request = admin_pb2.ApplyRequest(deployment=codec.to_proto(deployment))
            with admin(find_addresses(address)) as stub:
                created = stub.Apply(request, timeout=CALL_TIMEOUT_S).created
            row = {"deployment": deployment.deployment, "created": created}
            _print(row, json, lambda row: f"{row['deployment']}: {'created' if row['created'] else 'changed'}")


def _with_folder(config: ClusterConfig) -> ClusterConfig:
    """The configuration with its model's folder, found or made as `perdure up` does: gateways read the tokenizer there,
    and know neither names nor this command's working directory. A path of other hosts is taken as it is."""
    path = Path(config.model.path)
    if path.is_absolute() and path.suffix != ".gguf":
        return config
    display = display_for_stderr()
    try:
        folder = asyncio.run(prepare_model(config.model.path, display))
    except ModelMissing as error:
        raise CtlError(str(error)) from error
    finally:
        display.close()
    return config.with_model(folder, config.model_name)


@app.command()
def scale(
    deployment: str,
    replicas: Annotated[int, typer.Argument(min=0)],
    address: Address = None,
    json: Json = False,
) -> None:
    """Have so many replicas of a deployment; those that go are drained."""
    request = admin_pb2.ScaleRequest(deployment=deployment, replicas=replicas)
    with _one_line_errors(), admin(find_addresses(address)) as stub:
        stub.Scale(request, timeout=CALL_TIMEOUT_S)
    row = {"deployment": deployment, "replicas": replicas}
    _print(row, json, lambda row: f"{row['deployment']}: {row['replicas']} replicas wanted")


@app.command()
def delete(deployment: str, address: Address = None, json: Json = False) -> None:
    """Serve a deployment no more: its streams end with an error, its devices become free."""
    with _one_line_errors(), admin(find_addresses(address)) as stub:
        stub.Delete(admin_pb2.DeleteRequest(deployment=deployment), timeout=CALL_TIMEOUT_S)
    row = {"deployment": deployment, "deleted": True}
    _print(row, json, lambda row: f"deployment {row['deployment']} deleted")


rollout = typer.Typer(no_args_is_help=True, help="Restart parts of the cluster, one after the other, under load.")
app.add_typer(rollout, name="rollout")


@rollout.command("restart")
def rollout_restart(
    node: Annotated[list[str] | None, typer.Option(help="Only this node (may be repeated).")] = None,
    workers: Annotated[bool, typer.Option(help="Worker daemons too.")] = True,
    controlplanes: Annotated[bool, typer.Option(help="Control planes too: those at the addresses given.")] = True,
    deadline: Annotated[float, typer.Option(min=0, help="Seconds after which running streams move; 0: default.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each to be back.")] = 600,
    address: Address = None,
) -> None:
    """Drain each worker daemon and have it exit, then each control plane, the leader last; wait until one is back and
    everything serves before the next.

    Something must start again what exits: `perdure up`, systemd, Kubernetes do. Clients of a control plane that goes
    continue at another one; with a single one they wait until it is back.
    """
    nodes = node if node is not None or workers else []
    with _one_line_errors():
        plan = Restart(find_addresses(address), nodes, controlplanes and node is None, deadline, timeout)
        restart(plan, lambda line: typer.echo(line))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the command with one line on standard error and exit code 1 when what it guards fails."""
    try:
        yield
    except (CtlError, ConfigError) as error:
        typer.echo(f"perdure ctl: {error}", err=True)
        raise typer.Exit(1) from error


def _show_status(
    address: str | None,
    json: bool,
    view: Callable[[admin_pb2.StatusResponse], Any],
    table: Callable[[Any], RenderableType],
) -> None:
    with _one_line_errors(), admin(find_addresses(address)) as stub:
        rows = view(stub.Status(admin_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S))
    _print(rows, json, table)


def _print(rows: Any, json: bool, table: Callable[[Any], RenderableType]) -> None:
    if json:
        print(_json(rows, indent=2))
    else:
        tables.show(table(rows))


def _json(value: Any, indent: int | None) -> str:
    return json.dumps(value, indent=indent)


def _node_line(row: dict[str, str]) -> str:
    return f"{row['node']}: {row['state']}"
