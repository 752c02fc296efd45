"""`python -m tools.sim.shells SEED`: replay a seed over the real shells; `--seeds A..B`, `--minutes N` run many."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from typing import Annotated

import typer

from tools.sim.shells.run import Outcome, run_seed

SEEDS_MAX = 1 << 31


def main(
    seed: Annotated[int | None, typer.Argument(help="Replay this seed and print its story.")] = None,
    seeds: Annotated[str, typer.Option(help="Run the seeds A..B (B not included).")] = "",
    minutes: Annotated[float | None, typer.Option(help="Run fresh seeds, or --seeds, for so long.")] = None,
) -> None:
    """Real actors, links and mailboxes in virtual time. Exit status 1: something failed."""
    if seed is not None:
        outcome = run_seed(seed)
        _tell(outcome)
        raise typer.Exit(0 if outcome.ok else 1)
    if not seeds and minutes is None:
        raise typer.BadParameter("give a seed, --seeds A..B or --minutes N")
    first, _, end = seeds.partition("..")
    numbers = range(int(first), int(end)) if seeds else itertools.count(random.SystemRandom().randrange(SEEDS_MAX))
    until = time.monotonic() + minutes * 60 if minutes is not None else float("inf")
    raise typer.Exit(_many(numbers, until))


def _many(numbers: itertools.count[int] | range, until: float) -> int:
    failed, ran, cpu_s, virtual_s, faults, outcomes = 0, 0, 0.0, 0.0, 0, Counter[str]()
    for seed in numbers:
        outcome = run_seed(seed)
        ran, cpu_s, virtual_s = ran + 1, cpu_s + outcome.cpu_s, virtual_s + outcome.virtual_s
        faults, outcomes = faults + len(outcome.faults), outcomes + outcome.outcomes
        if not outcome.ok:
            failed += 1
            print(f"seed {seed} failed: {outcome.error}", flush=True)
        if time.monotonic() >= until:
            break
    ends = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
    print(
        f"{ran} seeds ({ran / cpu_s * 60:.0f} a minute of one core), {virtual_s / 3600:.2f} virtual hours, "
        f"{faults} faults, {outcomes.total()} requests ({ends}); {failed} failed"
    )
    return 1 if failed else 0


def _tell(outcome: Outcome) -> None:
    for line in outcome.story:
        print(line)
    print(outcome.trace, end="")
    print(outcome.error or "ok", f"{outcome.virtual_s:.0f} virtual seconds", f"story {outcome.digest}", sep="; ")


if __name__ == "__main__":
    typer.run(main)
