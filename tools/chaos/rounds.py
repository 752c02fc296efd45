"""Runs a plan: an undisturbed wave first, then a wave for each round, compared with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos.perdure.v1 import admin_pb2
from tools.chaos.live import LiveCluster
from tools.chaos.load import Load, Stream
from tools.chaos.plan import Fault, Plan, Round


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one round cost."""

    title: str
    load: Load
    # time.monotonic at the wave's start.
    begun: float
    # (time.monotonic, what was done).
    inflicted: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    # (time.monotonic when it was noticed, the leader's record).
    failures: list[tuple[float, admin_pb2.FailureStatus]] = field(
        default_factory=list[tuple[float, admin_pb2.FailureStatus]]
    )
    # Streams that ended otherwise than the undisturbed run's, by number.
    differing: dict[int, str] = field(default_factory=dict[int, str])

    @property
    def longest_gap_s(self) -> float:
        return max(stream.longest_gap_s for stream in self.load.streams)

    @property
    def passed(self) -> bool:
        """Every stream is as if nothing had been, and every new request was served."""
        return not self.differing and not self.load.new.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A plan's run."""

    undisturbed: Outcome
    rounds: Sequence[Outcome]


async def run_plan(plan: Plan, cluster: LiveCluster, urls: Sequence[str], say: Callable[[str], None]) -> Result:
    """Raises ChaosError if the cluster is not whole, or lacks somebody that the plan names."""
    await cluster.wait_whole(plan.heal)
    for fault in (fault for part in plan.rounds for fault in part.faults):
        await cluster.find(fault.target)
    say("undisturbed run …")
    undisturbed = await _run_round(plan, Round.model_construct(name="undisturbed", faults=[]), cluster, urls)
    outcomes: list[Outcome] = []
    for part in plan.rounds:
        await cluster.wait_whole(plan.heal)
        outcome = await _run_round(plan, part, cluster, urls)
        outcome.differing = differing(outcome.load.streams, undisturbed.load.streams)
        outcomes.append(outcome)
        verdict = "ok" if outcome.passed else "FAILED"
        say(f"{part.title}: {verdict}, longest gap {outcome.longest_gap_s * 1000:.0f} ms")
    await cluster.wait_whole(plan.heal)
    return Result(undisturbed=undisturbed, rounds=outcomes)


def differing(streams: Sequence[Stream], undisturbed: Sequence[Stream]) -> dict[int, str]:
    """Number of each stream that is not as in the undisturbed run, and how."""
    found: dict[int, str] = {}
    for index, (stream, reference) in enumerate(zip(streams, undisturbed, strict=True)):
        if stream.error:
            found[index] = f"ended after {len(stream.times)} events: {stream.error}"
        elif not stream.finish:
            found[index] = "ended without a finish"
        elif stream.text != reference.text:
            found[index] = f"another text, from character {_first_difference(stream.text, reference.text)} on"
    return found


async def _run_round(plan: Plan, part: Round, cluster: LiveCluster, urls: Sequence[str]) -> Outcome:
    outcome = Outcome(title=part.title, load=Load(urls, plan.streams, plan.tokens), begun=time.monotonic())
    before = {_key(failure) for failure in await cluster.failures()}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(outcome.load.run())
        if plan.new_request_every:
            tasks.create_task(outcome.load.ask_all_along(plan.new_request_every))
        for fault in part.faults:
            tasks.create_task(_inflict(fault, cluster, outcome))
    found, now = await cluster.failures(), time.monotonic()
    outcome.failures = [(now - item.age_ms / 1000, item) for item in found if _key(item) not in before]
    return outcome


async def _inflict(fault: Fault, cluster: LiveCluster, outcome: Outcome) -> None:
    await outcome.load.reach(fault.at)
    await asyncio.sleep(fault.after)
    outcome.inflicted.append((time.monotonic(), str(fault)))
    await cluster.inflict(fault)


def _key(failure: admin_pb2.FailureStatus) -> tuple[str, int]:
    return failure.replica, failure.epoch


def _first_difference(text: str, reference: str) -> int:
    same = (index for index, (a, b) in enumerate(zip(text, reference, strict=False)) if a != b)
    return next(same, min(len(text), len(reference)))
