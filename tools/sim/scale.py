"""Clusters of up to thousands of nodes around one real leader's core: its work by kind of event, memory, and how both
grow with size.

Workers and gateways answer at once, so that what is measured is the leader alone. `python -m tools.sim.scale`.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from controlplane.core.messages import (
    Effect,
    Event,
    GatewayOpened,
    GatewaySaid,
    Probe,
    ProbeDone,
    RevokeDone,
    RevokeLease,
    SendGateway,
    SendWorker,
    StoreLoaded,
    Tick,
    WorkerClosed,
    WorkerOpened,
    WorkerSaid,
    WriteDone,
    WritePlacement,
)
from controlplane.core.state import ClusterState, Limits
from controlplane.core.step import step
from controlplane.runtime.ids import Attempt, DeploymentId, RequestId, Term
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaPhase, ReplicaSpec
from controlplane.runtime.messages.route import (
    EndBatch,
    EndEntry,
    Outcome,
    ReplicaClosed,
    RouteBatch,
    RouteCause,
    RoutedBatch,
    RouteEntry,
)
from controlplane.runtime.records import DeploymentRecord
from controlplane.runtime.timing import derive_timings
from tools.sim.scale_peers import CLUSTER, DEVICES, Gateway, Worker

GATEWAYS = 8
REQUESTS_A_NODE = 100
SPARE_SHARE = 0.1
"""Nodes without a replica, for those that are lost."""
RACK_SHARE = 0.05
BATCH = 32
"""Requests of one Route frame."""
TICKS_MAX = 200
SIZES = "125,250,500,1000"


@dataclass(slots=True)
class Work:
    """Processor time that the core took for events of one kind."""

    events: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.events += 1
        self.seconds += seconds
        self.longest_s = max(self.longest_s, seconds)


@dataclass(slots=True)
class Measured:
    """One size."""

    nodes: int
    requests: int
    # Seconds of the leader's work, by phase.
    phases: dict[str, float] = field(default_factory=dict[str, float])
    work: dict[str, Work] = field(default_factory=lambda: defaultdict[str, Work](Work))
    memory_mb: float = 0.0
    replayed: int = 0
    regrouped: int = 0


class ScaleWorld:
    """One leader and its peers."""

    def __init__(self, nodes: int) -> None:
        self.now = 1000.0
        self.measured = Measured(nodes, nodes * REQUESTS_A_NODE)
        self.state = ClusterState.new(
            term=Term(1),
            name="cp1",
            incarnation=Worker.incarnation_of("cp1"),
            cluster=CLUSTER,
            timings=derive_timings(),
            limits=Limits(queued_requests_max=nodes * REQUESTS_A_NODE),
            rng_seed=1,
        )
        self.workers = [Worker(f"n{number}", number + 1) for number in range(nodes)]
        self.gateways = [Gateway(f"g{number}", nodes + number + 1) for number in range(GATEWAYS)]
        self._by_connection = {one.connection: one for one in (*self.workers, *self.gateways)}
        self._by_node = {worker.node: worker for worker in self.workers}
        self._answers: deque[Event] = deque()
        self._seconds = 0.0

    # ------------------------------------------------------------ driving

    def step(self, event: Event) -> None:
        """One event, timed, and what the peers make of it, queued."""
        begun = time.thread_time()
        effects = step(self.state, event, self.now)
        seconds = time.thread_time() - begun
        body = getattr(event, "body", None)
        self.measured.work[type(body or event).__name__].add(seconds)
        self._seconds += seconds
        for effect in effects:
            self._answers.extend(self._answer(effect))

    def settle(self) -> None:
        """Until nobody has anything to answer."""
        while self._answers:
            self.step(self._answers.popleft())

    def tick(self) -> None:
        """A heartbeat interval of everybody."""
        self.now += self.state.timings.heartbeat_interval
        for worker in self.workers:
            if worker.alive:
                self.step(WorkerSaid(worker.connection, worker.head(), worker.heartbeat()))
        for gateway in self.gateways:
            self.step(GatewaySaid(gateway.connection, gateway.head(), gateway.heartbeat()))
        self.step(Tick())
        self.settle()

    def phase(self, name: str, work: Callable[[], None]) -> None:
        self._seconds = 0.0
        work()
        self.settle()
        self.measured.phases[name] = self._seconds

    def _answer(self, effect: Effect) -> Iterator[Event]:
        match effect:
            case WritePlacement(write):
                yield WriteDone(write, True)
            case Probe(node, incarnation):
                yield ProbeDone(node, incarnation, not self._by_node[node].alive)
            case RevokeLease(node, incarnation):
                yield RevokeDone(node, incarnation, True)
            case SendWorker(connection, body):
                worker = self._by_connection[connection]
                assert isinstance(worker, Worker)
                for answer in worker.take(body):
                    yield WorkerSaid(connection, worker.head(), answer)
            case SendGateway(connection, body):
                gateway = self._by_connection[connection]
                assert isinstance(gateway, Gateway)
                yield from self._gateway_takes(gateway, body)
            case _:
                pass

    def _gateway_takes(self, gateway: Gateway, body: object) -> Iterator[Event]:
        gateway.take(body)
        if isinstance(body, RoutedBatch):
            assert not body.refused, f"refused: {body.refused[0].reason.text}"
            for routed in body.routed:
                self._by_node[routed.node].begin(routed.permit)
                gateway.placed[routed.permit.replica, routed.permit.epoch][routed.permit.request] = (
                    routed.permit.attempt
                )
        elif isinstance(body, ReplicaClosed):
            lost = gateway.placed.pop((body.replica, body.epoch), {})
            entries = [_entry(name, attempt + 1, RouteCause.LOST) for name, attempt in lost.items()]
            self.measured.replayed += len(entries)
            for start in range(0, len(entries), BATCH):
                batch = RouteBatch(entries=tuple(entries[start : start + BATCH]))
                yield GatewaySaid(gateway.connection, gateway.head(), batch)

    # ------------------------------------------------------------ phases

    def run(self) -> Measured:
        """Everything that is measured."""
        gc.collect()
        before = _resident_mb()
        self.phase("join and place", self.join)
        self.phase("route", self.route)
        gc.collect()
        self.measured.memory_mb = _resident_mb() - before
        self.phase("one heartbeat interval", self.tick)
        self.phase("lose a rack", self.lose_rack)
        self.phase("end", self.end)
        return self.measured

    def join(self) -> None:
        self.step(
            StoreLoaded(
                {worker.node: worker.record() for worker in self.workers},
                {DeploymentId("m"): self._deployment()},
                {},
                frozenset(),
            )
        )
        for gateway in self.gateways:
            self.step(GatewayOpened(gateway.connection, gateway.hello()))
            self.settle()
        for worker in self.workers:
            self.step(WorkerOpened(worker.connection, worker.hello()))
            self.settle()
        self._until_serving()

    def route(self) -> None:
        for start in range(0, self.measured.requests, BATCH):
            gateway = self.gateways[start // BATCH % GATEWAYS]
            numbers = range(start, min(start + BATCH, self.measured.requests))
            entries = tuple(_entry(RequestId(f"{number:032x}"), 1, RouteCause.NEW) for number in numbers)
            self.step(GatewaySaid(gateway.connection, gateway.head(), RouteBatch(entries=entries)))
            self.settle()
        self._until_routed()

    def lose_rack(self) -> None:
        """Its daemons die at once; every request that ran there runs again, every replica has a new place."""
        lost = [worker for worker in self.workers if worker.serves][: max(1, round(len(self.workers) * RACK_SHARE))]
        for worker in lost:
            worker.alive = False
        for worker in lost:
            self.step(WorkerClosed(worker.connection))
        self.settle()
        self._until_serving()
        self._until_routed()
        self.measured.regrouped = len(lost)

    def end(self) -> None:
        for gateway in self.gateways:
            held = [(name, attempt) for placed in gateway.placed.values() for name, attempt in placed.items()]
            for start in range(0, len(held), BATCH):
                entries = tuple(
                    EndEntry(request=name, attempt=Attempt(attempt), outcome=Outcome.FINISHED, tokens=1)
                    for name, attempt in held[start : start + BATCH]
                )
                self.step(GatewaySaid(gateway.connection, gateway.head(), EndBatch(entries=entries)))
        self.settle()
        assert not self.state.requests, "a request is forgotten"

    def _until_serving(self) -> None:
        for _ in range(TICKS_MAX):
            replicas = self.state.replicas.values()
            if replicas and all(replica.phase is ReplicaPhase.READY for replica in replicas):
                return
            self.tick()
        raise AssertionError("replicas are not placed")

    def _until_routed(self) -> None:
        for _ in range(TICKS_MAX):
            if not any(request.permit is None for request in self.state.requests.values()):
                return
            self.tick()
        raise AssertionError("requests are not routed")

    def _deployment(self) -> DeploymentRecord:
        spec = ReplicaSpec(deployment=DeploymentId("m"), model_path="m", degrees=ParallelDegrees(tensor=DEVICES))
        replicas = max(1, round(len(self.workers) * (1 - SPARE_SHARE)))
        return DeploymentRecord(deployment=DeploymentId("m"), model="m", spec=spec, replicas=replicas)


def _entry(request: RequestId, attempt: int, cause: RouteCause) -> RouteEntry:
    return RouteEntry(
        request=request,
        attempt=Attempt(attempt),
        deployment=DeploymentId("m"),
        cause=cause,
        prompt_tokens=200,
        max_tokens=100,
    )


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# ---------------------------------------------------------------- growth


def growth(sizes: list[int], values: list[float]) -> float:
    """Exponent b of the least-squares fit values = a · sizes^b."""
    xs, ys = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def table(runs: list[Measured]) -> str:
    """What was measured, a line a phase and a line a kind of event, with how each grows."""
    sizes = [run.nodes for run in runs]
    lines = [f"{'nodes':<34}" + "".join(f"{size:>11}" for size in sizes) + "     growth"]
    lines.append(f"{'ranks':<34}" + "".join(f"{size * DEVICES:>11}" for size in sizes))
    lines.append(f"{'requests':<34}" + "".join(f"{run.requests:>11}" for run in runs))
    for phase in runs[0].phases:
        lines.append(_line(f"{phase} (s)", sizes, [run.phases[phase] for run in runs]))
    lines.append(_line("memory (MB)", sizes, [run.memory_mb for run in runs]))
    for kind in sorted(runs[-1].work, key=lambda kind: -runs[-1].work[kind].seconds):
        each = [run.work[kind].seconds / max(1, run.work[kind].events) * 1e6 for run in runs]
        lines.append(_line(f"{kind} (µs an event)", sizes, each))
    return "\n".join(lines)


def _line(name: str, sizes: list[int], values: list[float]) -> str:
    exponent = growth(sizes, values) if len(sizes) > 1 else 0.0
    return f"{name:<34}" + "".join(f"{value:>11.3g}" for value in values) + f"     n^{exponent:.2f}"


def plot(runs: list[Measured], path: Path) -> None:
    """Phases against size, on logarithmic axes, each named where its line ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    sizes = [run.nodes for run in runs]
    last = sizes[-1]
    for phase in runs[0].phases:
        seconds = [run.phases[phase] for run in runs]
        (line,) = axes.loglog(sizes, seconds, marker="o", linewidth=2)
        label = f" {phase}: {seconds[-1]:.2g} s, n^{growth(sizes, seconds):.2f}"
        axes.annotate(label, (last, seconds[-1]), va="center", color=line.get_color(), fontsize=11)
        fitted = [seconds[-1] * size * math.log(size) / (last * math.log(last)) for size in sizes]
        axes.loglog(sizes, fitted, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("nodes, with 8 ranks and 100 requests each")
    axes.set_ylabel("seconds of the leader's work on one core")
    axes.set_title("The leader's work by size of the cluster (dotted: n·log n to the same end)", fontsize=12)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of nodes.")] = SIZES,
    picture: Annotated[Path | None, typer.Option(help="Plot into this file.")] = None,
) -> None:
    """The leader's work in clusters of these sizes."""
    runs = [ScaleWorld(int(size)).run() for size in sizes.split(",")]
    print(table(runs))
    if picture is not None:
        plot(runs, picture)


if __name__ == "__main__":
    typer.run(main)
