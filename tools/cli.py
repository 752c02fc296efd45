"""`perdure`: the command line. A command's code is imported only when that command is called."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import typer

EXIT_NOT_INSTALLED = 2


@dataclass(frozen=True, slots=True)
class Command:
    """One command, or a group of them, and where its code is."""

    module: str
    attribute: str
    summary: str


COMMANDS = {
    "up": Command("tools.up.command", "up_command", "Start a whole cluster on this machine and serve a model."),
    "serve": Command(
        "tools.up.serve", "serve_command", "Start this host's part of a cluster; run it once on every host."
    ),
    "controlplane": Command("controlplane.__main__", "controlplane_command", "Run one control-plane process."),
    "worker": Command("dataplane.__main__", "worker_command", "Run this node's worker daemon."),
    "ctl": Command("tools.ctl.app", "app", "Look at a running cluster and steer it."),
    "bench": Command("tools.bench.__main__", "app", "Measure the engine against the hardware and its peers."),
    "chaos": Command(
        "tools.chaos.command", "chaos_command", "Break parts of a test cluster and see that no stream is hurt."
    ),
    "version": Command("tools.version", "version_command", "Print the versions of Perdure and what it stands on."),
}


def build_app(wanted: str | None) -> typer.Typer:
    """The root command. Of all commands only `wanted` is imported; the others stand there with their summaries."""
    app = typer.Typer(
        name="perdure",
        help="Serves large language models on one machine or many, and outlives its machines.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        # Plain help: in 80 columns the boxes cut long options.
        rich_markup_mode=None,
    )
    for name, command in COMMANDS.items():
        if name == wanted:
            _attach(app, name, command)
        else:
            app.command(name, help=command.summary)(_not_imported)
    return app


def _attach(app: typer.Typer, name: str, command: Command) -> None:
    target = getattr(_imported(name, command.module), command.attribute)
    if isinstance(target, typer.Typer):
        app.add_typer(target, name=name, help=command.summary)
    else:
        app.command(name, help=command.summary)(target)


def _imported(name: str, module: str) -> ModuleType:
    """A command's code. A package that only workers need may be missing on this host: say so in one line."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("controlplane", "dataplane", "protos", "tools"):
            raise
        typer.echo(f"perdure {name}: needs the package {error.name}: pip install 'perdure[worker]'", err=True)
        raise SystemExit(EXIT_NOT_INSTALLED) from error


def _not_imported() -> None:
    """Stands for a command in the root's help."""


def wanted_command(arguments: list[str]) -> str | None:
    """The command that the arguments call: the first that is not an option."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def main() -> None:
    """Entry point of the `perdure` script."""
    build_app(wanted_command(sys.argv[1:]))()


if __name__ == "__main__":
    main()
