"""Runs a plan: an undisturbed wave first, then a wave for each round, compared with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos.perdure.v1 import admin_pb2
from tools.chaos.chronicle import Chronicle
from tools.chaos.disk import DiskError
from tools.chaos.fault import Fault
from tools.chaos.faults import Saboteur
from tools.chaos.hosts import Hosts, HostsError
from tools.chaos.live import POLL_S, ChaosError, LiveCluster
from tools.chaos.load import Load, Stream
from tools.chaos.network import NetworkError
from tools.chaos.plan import Plan


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
    # (time.monotonic, what the leaders noted).
    events: list[tuple[float, admin_pb2.EventsResponse]] = field(
        default_factory=list[tuple[float, admin_pb2.EventsResponse]]
    )
    # Streams that ended otherwise than the undisturbed run's, by their place in the load.
    differing: dict[int, str] = field(default_factory=dict[int, str])
    # What else was not as it has to be.
    problems: list[str] = field(default_factory=list[str])
    # From the end of the last stream until the cluster was whole; 0: it was not.
    whole_s: float = 0.0

    @property
    def longest_gap_s(self) -> float:
        """Of all streams, since the first fault."""
        since = min((at for at, _ in self.inflicted), default=self.begun)
        return max((stream.longest_gap_s(since) for stream in self.load.streams), default=0.0)

    @property
    def passed(self) -> bool:
        """Every stream is as if nothing had been, every new request was served, and the cluster is whole again."""
        return not (self.differing or self.load.new.failed or self.problems)

    @property
    def verdict(self) -> str:
        return "ok" if self.passed else "FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A plan's run."""

    # Of the cluster; empty if nobody named it.
    name: str = ""
    undisturbed: Outcome
    rounds: Sequence[Outcome]


async def run_plan(
    plan: Plan,
    cluster: LiveCluster,
    hosts: Hosts | None,
    urls: Sequence[str],
    say: Callable[[str], None],
    save: Callable[[Result], None],
) -> Result:
    """`save` has the result as far as it goes after each round. Raises ChaosError if the cluster is not whole at first,
    or lacks somebody that the plan names."""
    await cluster.wait_whole(plan.heal)
    for fault in (fault for part in plan.rounds for fault in part.faults):
        await Saboteur(cluster, hosts, say).check(fault)
    say("undisturbed run …")
    undisturbed = Outcome(title="undisturbed", load=Load(urls, plan.streams, plan.tokens), begun=time.monotonic())
    await _run_round(plan, [], cluster, hosts, undisturbed)
    outcomes: list[Outcome] = []
    for part in plan.rounds:
        streams = plan.streams if part.streams is None else part.streams
        outcome = Outcome(title=part.title, load=Load(urls, streams, plan.tokens), begun=time.monotonic())
        outcomes.append(outcome)
        await _run_round(plan, part.faults, cluster, hosts, outcome)
        outcome.differing = differing(outcome.load.streams, undisturbed.load.streams)
        say(f"{part.title}: {outcome.verdict}, longest gap {outcome.longest_gap_s * 1000:.0f} ms")
        save(Result(name=plan.name, undisturbed=undisturbed, rounds=outcomes))
        if not outcome.whole_s:
            # No later round could be judged.
            break
    return Result(name=plan.name, undisturbed=undisturbed, rounds=outcomes)


def differing(streams: Sequence[Stream], undisturbed: Sequence[Stream]) -> dict[int, str]:
    """Place of each stream that is not as in the undisturbed run, and how."""
    references = {reference.number: reference for reference in undisturbed}
    found: dict[int, str] = {}
    for place, stream in enumerate(streams):
        reference = references[stream.number]
        if stream.error:
            found[place] = f"ended after {len(stream.times)} events: {stream.error}"
        elif not stream.finish:
            found[place] = "ended without a finish"
        elif stream.text != reference.text:
            found[place] = f"another text, from character {_first_difference(stream.text, reference.text)} on"
    return found


async def _run_round(
    plan: Plan, faults: Sequence[Fault], cluster: LiveCluster, hosts: Hosts | None, outcome: Outcome
) -> None:
    chronicle = Chronicle(cluster)
    await chronicle.begin()
    following = asyncio.create_task(chronicle.follow())
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(outcome.load.run())
            if plan.new_request_every and outcome.load.streams:
                tasks.create_task(outcome.load.ask_all_along(plan.new_request_every))
            tasks.create_task(_inflict_all(faults, cluster, hosts, outcome))
        ended = time.monotonic()
        await cluster.wait_whole(plan.heal)
        outcome.whole_s = max(time.monotonic() - ended, POLL_S)
        await chronicle.read()
    except ChaosError as error:
        outcome.problems.append(str(error))
    finally:
        following.cancel()
    outcome.failures, outcome.events = chronicle.failures, chronicle.events


async def _inflict_all(faults: Sequence[Fault], cluster: LiveCluster, hosts: Hosts | None, outcome: Outcome) -> None:
    async with asyncio.TaskGroup() as tasks:
        for fault in faults:
            tasks.create_task(_inflict(fault, cluster, hosts, outcome))
    outcome.load.enough()


async def _inflict(fault: Fault, cluster: LiveCluster, hosts: Hosts | None, outcome: Outcome) -> None:
    def note(text: str) -> None:
        outcome.inflicted.append((time.monotonic(), text))

    saboteur = Saboteur(cluster, hosts, note)
    await outcome.load.reach(fault.at)
    await asyncio.sleep(fault.after)
    try:
        if fault.when:
            await saboteur.wait_for(fault.when)
        async with asyncio.TaskGroup() as tasks:
            for number in range(fault.times):
                if number:
                    await asyncio.sleep(fault.every)
                note(str(fault) if fault.times == 1 else f"{fault} ({number + 1})")
                tasks.create_task(saboteur.inflict(fault))
        if fault.seconds:
            note(f"over: {fault}")
    except* (ChaosError, HostsError, NetworkError, DiskError, ProcessLookupError) as errors:
        outcome.problems += [f"{fault}: {error}" for error in errors.exceptions]


def _first_difference(text: str, reference: str) -> int:
    same = (index for index, (a, b) in enumerate(zip(text, reference, strict=False)) if a != b)
    return next(same, min(len(text), len(reference)))
