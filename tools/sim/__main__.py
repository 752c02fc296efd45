"""`python -m tools.sim`: replay a seed and print its story, or run many and shrink the one that fails."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tools.sim.campaign import run_campaign
from tools.sim.run import Outcome, run_seed
from tools.sim.scenario import of_outcome, read_scenario
from tools.sim.shrink import shape_text, shrink
from tools.sim.story import filtered

SCENARIOS = Path("tests/scenario/sim")
SEEDS_MAX = 1 << 31

app = typer.Typer(add_completion=False)


@app.command()
def main(
    seed: Annotated[int | None, typer.Argument(help="Replay this seed and print its story.")] = None,
    seeds: Annotated[str, typer.Option(help="Run the seeds A..B (B not included).")] = "",
    minutes: Annotated[float | None, typer.Option(help="Run fresh seeds, or --seeds, for so long.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Story lines that name this request, node or replica.")] = None,
    scenario: Annotated[
        Path | None, typer.Option(help="Run a scenario's file and print its story.", exists=True, dir_okay=False)
    ] = None,
    shorten: Annotated[
        bool | None,
        typer.Option(
            "--shrink/--no-shrink",
            help="Look for a short schedule that fails alike. Without the option: if one of many seeds failed.",
        ),
    ] = None,
    save: Annotated[str, typer.Option(help="Shrink the failure and save it under this name.")] = "",
    failures: Annotated[int, typer.Option(help="Stop after so many failed seeds.", min=1)] = 1,
) -> None:
    """A cluster of real cores in a world of faults. Exit status 1: something failed.

    One of SEED, --seeds, --minutes and --scenario says what to run. The same seed gives the same story, to the byte.
    """
    if scenario is None and seed is None:
        failed = _campaign(seeds, minutes, jobs, failures)
        shorten = shorten is not False
    else:
        outcome = run_seed(seed) if seed is not None else _run_scenario(scenario)
        _tell(outcome, tuple(only or ()))
        failed = None if outcome.ok else outcome
    if failed is not None and (shorten or save):
        _shrink(failed, save)
    raise typer.Exit(1 if failed is not None else 0)


def _run_scenario(path: Path | None) -> Outcome:
    assert path is not None
    try:
        return read_scenario(path).run()
    except ValueError as error:
        raise typer.BadParameter(f"{path}: {error}") from error


def _campaign(seeds: str, minutes: float | None, jobs: int, failures: int) -> Outcome | None:
    """The first that failed."""

    def failed(outcome: Outcome) -> None:
        print(f"seed {outcome.seed} failed: {outcome.error}", flush=True)

    tally = run_campaign(_range(seeds, minutes), jobs=jobs, minutes=minutes, failures_max=failures, on_failure=failed)
    print(tally)
    return tally.failed[0] if tally.failed else None


def _range(seeds: str, minutes: float | None) -> Iterable[int]:
    if seeds:
        if (ends := re.fullmatch(r"(\d+)\.\.(\d+)", seeds)) is None:
            raise typer.BadParameter(f"--seeds {seeds} is no range A..B")
        return range(int(ends[1]), int(ends[2]))
    if minutes is None:
        raise typer.BadParameter("give a seed, --seeds A..B, --minutes N or --scenario FILE")
    return itertools.count(random.SystemRandom().randrange(SEEDS_MAX))


def _tell(outcome: Outcome, only: tuple[str, ...]) -> None:
    print(f"seed {outcome.seed}: {shape_text(outcome.shape)}")
    for fault in outcome.faults:
        print(f"  {fault}")
    for line in filtered(outcome.story, only):
        print(line)
    if outcome.trace:
        print(outcome.trace)
    print(
        outcome.error or "ok", f"{outcome.struck} faults, {outcome.requests} requests, story {outcome.digest}", sep="; "
    )


def _shrink(failed: Outcome, name: str) -> None:
    """Print the shortest schedule found that fails alike; keep it if it has a name."""
    short = shrink(failed, lambda text: print(text, flush=True))
    text = str(of_outcome(short, short.error))
    print(text, end="")
    if name:
        path = SCENARIOS / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"saved {path}")


if __name__ == "__main__":
    app()
