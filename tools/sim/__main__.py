"""`python -m tools.sim`: replay a seed and print its story, or run many and shrink the one that fails."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tools.sim.campaign import run_campaign
from tools.sim.run import Outcome, run_seed
from tools.sim.scenario import of_outcome, read_scenario
from tools.sim.shrink import shape_text, shrink

SCENARIOS = Path("tests/scenario/sim")
SEEDS_MAX = 1 << 31

app = typer.Typer(add_completion=False)


@app.command()
def main(
    seed: Annotated[int | None, typer.Argument(help="Replay this seed and print its story.")] = None,
    seeds: Annotated[str, typer.Option(help="Run the seeds A..B (B not included).")] = "",
    minutes: Annotated[float | None, typer.Option(help="Run fresh seeds, or --seeds, for so long.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Story lines that name this request, node or replica.")] = None,
    scenario: Annotated[Path | None, typer.Option(help="Run a scenario's file and print its story.")] = None,
    save: Annotated[str, typer.Option(help="Shrink the failure and save it under this name.")] = "",
    failures: Annotated[int, typer.Option(help="Stop after so many failed seeds.")] = 1,
) -> None:
    """A cluster of real cores in a world of faults. Exit status 1: something failed."""
    if scenario is not None:
        outcome = read_scenario(scenario).run()
        _tell(outcome, tuple(only or ()))
    elif seed is not None:
        outcome = run_seed(seed)
        _tell(outcome, tuple(only or ()))
        _save(outcome, save)
    else:
        _campaign(seeds, minutes, jobs, failures, save)
        return
    raise typer.Exit(0 if outcome.ok else 1)


def _campaign(seeds: str, minutes: float | None, jobs: int, failures: int, save: str) -> None:
    def failed(outcome: Outcome) -> None:
        print(f"seed {outcome.seed} failed: {outcome.error}", flush=True)

    tally = run_campaign(_range(seeds, minutes), jobs=jobs, minutes=minutes, failures_max=failures, on_failure=failed)
    print(tally)
    if tally.failed:
        _save(tally.failed[0], save)
        raise typer.Exit(1)


def _range(seeds: str, minutes: float | None) -> Iterable[int]:
    if seeds:
        first, _, end = seeds.partition("..")
        return range(int(first), int(end))
    if minutes is None:
        raise typer.BadParameter("give a seed, --seeds A..B or --minutes N")
    return itertools.count(random.SystemRandom().randrange(SEEDS_MAX))


def _tell(outcome: Outcome, only: tuple[str, ...]) -> None:
    print(f"seed {outcome.seed}: {shape_text(outcome.shape)}")
    for fault in outcome.faults:
        print(f"  {fault}")
    for line in outcome.story:
        if not only or any(word in line for word in only):
            print(line)
    if outcome.trace:
        print(outcome.trace)
    print(
        outcome.error or "ok", f"{outcome.struck} faults, {outcome.requests} requests, story {outcome.digest}", sep="; "
    )


def _save(outcome: Outcome, name: str) -> None:
    if not name or outcome.ok:
        return
    short = shrink(outcome, lambda text: print(text, flush=True))
    path = SCENARIOS / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(of_outcome(short, short.error)))
    print(f"saved {path}")
    print(path.read_text())


if __name__ == "__main__":
    app()
