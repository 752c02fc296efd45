"""`python -m tools.bench`: benchmarks that measure Perdure and a peer side by side, in one run."""

from __future__ import annotations

import typer

from tools.bench.collectives import collectives_command
from tools.bench.commands import attention_command, engine_command

app = typer.Typer(
    help="Measure Perdure beside its peers: tables, JSON and plots.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("engine")(engine_command)
app.command("attention")(attention_command)
app.command("collectives")(collectives_command)


if __name__ == "__main__":
    app()
