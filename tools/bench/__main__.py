"""`python -m tools.bench`: benchmarks that measure Perdure and a peer side by side, in one run."""

from __future__ import annotations

import typer

from tools.bench.collectives import collectives_command

app = typer.Typer(
    help="Measure Perdure beside its peers: tables, JSON and plots.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("collectives")(collectives_command)


@app.callback()
def _root() -> None:
    """Makes every benchmark a subcommand, also while there is only one."""


if __name__ == "__main__":
    app()
