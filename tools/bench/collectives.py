"""`python -m tools.bench collectives`: every exchange between ranks against raw torch.distributed."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

from dataplane.parallel.mesh import Rendezvous
from tools.bench.exchanges import HOST, Plan, Row, measure
from tools.bench.report import machine, plot_lines, print_table, write_json

SIZES = (256, 4096, 65_536, 1_048_576)


def collectives_command(
    ranks: Annotated[int, typer.Option(help="Processes, all on this machine.", min=2)] = 2,
    backend: Annotated[str, typer.Option(help="gloo, or nccl with a GPU a rank.")] = "gloo",
    sizes: Annotated[list[int] | None, typer.Option(help="Bytes that a rank brings; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each side; medians are told.", min=1)] = 7,
    round_s: Annotated[float, typer.Option(help="Seconds that a turn takes, about.")] = 0.05,
    output: Annotated[Path, typer.Option(help="Folder of collectives.json and collectives.svg.")] = Path("bench"),
) -> None:
    """Time each exchange as Perdure makes it and as torch.distributed does, by turns in the same processes."""
    plan = Plan(ranks, backend, tuple(sizes or SIZES), rounds, round_s)
    rows = _run(plan)
    print_table(
        f"{ranks} ranks, {backend}, medians of {rounds} turns",
        ("exchange", "bytes", "Perdure µs", "torch µs", "torch ÷ Perdure"),
        [
            (row.exchange, f"{row.bytes:,}", _micro(row.ours_s), _micro(row.torch_s), f"{row.torch_s / row.ours_s:.2f}")
            for row in rows
        ],
    )
    write_json(output / "collectives.json", {**machine(), **asdict(plan), "rows": [asdict(row) for row in rows]})
    _plot(output / "collectives.svg", rows)
    typer.echo(f"Written: {output}/collectives.json, {output}/collectives.svg")


def _run(plan: Plan) -> list[Row]:
    rendezvous = Rendezvous.listen(HOST)
    # Fresh processes: a fork of one that has used torch can hang.
    with ProcessPoolExecutor(plan.ranks, mp_context=get_context("spawn")) as pool:
        answers = [pool.submit(measure, rank, plan, rendezvous.address) for rank in range(plan.ranks)]
        return answers[0].result()


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def _plot(path: Path, rows: list[Row]) -> None:
    sized = sorted((row for row in rows if row.bytes), key=lambda row: (row.exchange, row.bytes))
    panels = {
        name: {
            "Perdure": [(row.bytes, row.ours_s * 1e6) for row in group],
            "torch.distributed": [(row.bytes, row.torch_s * 1e6) for row in group],
        }
        for name, group in ((name, list(part)) for name, part in groupby(sized, key=lambda row: row.exchange))
    }
    plot_lines(path, panels, "bytes", "µs a call")
