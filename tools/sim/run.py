"""One run of one seed: a warm-up, faults under load, healing, and then everything must come right in bounded time."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random

from controlplane.core.devices import free_nodes
from controlplane.core.elastic import is_shrunk
from controlplane.core.entities import GIVEN_UP, NodePhase
from controlplane.core.messages import ApplyAsked, UndrainAsked
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import NodeId
from controlplane.runtime.messages.common import ReplicaPhase
from tools.sim.faults import Fault, draw_schedule
from tools.sim.quiet import quiet
from tools.sim.striking import Striker
from tools.sim.world import Shape, World

FAULTS_S = 20.0
HEALED_WITHIN_S = 90.0
"""Virtual seconds from healing until every request ended, every replica serves and every queue is empty: a leader's
grace, a regroup with its retries, the patience with a node that does not return (10 F), and slack."""
GROWN_WITHIN_S = 60.0
"""So much longer until replicas that shrank have grown back: they wait for 10 F first."""
LOOK_S = 0.5
PROBES = 3


@dataclass(slots=True)
class Outcome:
    """What came of a seed."""

    seed: int
    shape: Shape
    faults: list[Fault]
    story: list[str] = field(default_factory=list[str])
    digest: str = ""
    # "" if all was well.
    error: str = ""
    trace: str = ""
    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    struck: int = 0
    # Faults that struck while that was under way.
    during: Counter[str] = field(default_factory=Counter[str])
    virtual_s: float = 0.0
    # From healing until all was well.
    healed_s: float = 0.0
    steps: int = 0
    # Processor time.
    cpu_s: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.error


def shape_of(seed: int) -> Shape:
    """A world for the seed: small ones, of many kinds."""
    random = Random(f"shape {seed}")
    tensor, pipeline = random.choice(((1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (2, 2)))
    workers = random.choice((1, 2, 3, 3, 4))
    devices = random.choice((1, 2))
    if workers * devices < tensor * pipeline:
        tensor = pipeline = 1
    elastic = random.choice((0, 1)) if tensor * pipeline > 1 else 0
    planes = random.choice((1, 2, 3, 3))
    shape = Shape(planes, workers, devices, tensor=tensor, pipeline=pipeline, elastic=elastic)
    shape = replace(shape, replicas=random.randrange(1, shape.room + 1))
    return replace(shape, spares=Random(f"spares {seed}").choice((0, 0, 1, 2)))


def schedule_of(seed: int, shape: Shape) -> list[Fault]:
    """The faults of the seed."""
    begin = Random(f"begin {seed}").choice((0.0, 5.0, 7.0))
    names = [f"cp{n}" for n in range(1, shape.control_planes + 1)], [f"w{n}" for n in range(1, shape.workers + 1)]
    return draw_schedule(seed, names, shape.devices, begin, begin + FAULTS_S)


def run_seed(
    seed: int, faults: list[Fault] | None = None, shape: Shape | None = None, healed_within_s: float = HEALED_WITHIN_S
) -> Outcome:
    """Run the seed's own schedule, or `faults` instead."""
    shape = shape or shape_of(seed)
    faults = schedule_of(seed, shape) if faults is None else faults
    outcome = Outcome(seed, shape, faults)
    begun = time.thread_time()
    with quiet():
        world = World(seed, shape)
        run = Run(world, faults, healed_within_s)
        try:
            run.play()
        except Exception as error:  # noqa: BLE001 - whatever breaks is what was looked for
            outcome.error = f"{type(error).__name__}: {str(error) or _failed_line(error)}"
            outcome.trace = traceback.format_exc()
            world.kernel.tell("world", "broke", error=outcome.error)
        world.end()
    outcome.story, outcome.digest = list(world.story.lines), world.story.digest
    outcome.requests = len(world.crowd.clients)
    outcome.outcomes = Counter(client.outcome for client in world.crowd.clients.values())
    outcome.struck, outcome.during = run.striker.struck, run.striker.during
    outcome.cpu_s = time.thread_time() - begun
    outcome.virtual_s, outcome.steps, outcome.healed_s = world.kernel.now, world.kernel.steps, run.healed_s
    return outcome


def _failed_line(error: Exception) -> str:
    """What was asserted without words."""
    return traceback.extract_tb(error.__traceback__)[-1].line or ""


class Run:
    """Drives a world through its phases."""

    def __init__(self, world: World, faults: list[Fault], healed_within_s: float) -> None:
        self.world = world
        self.striker = Striker(world)
        self.healed_s = 0.0
        self._faults = faults
        self._healed_within_s = healed_within_s
        self._load = True

    def play(self) -> None:
        """All of it. Raises AssertionError, or whatever a core raises."""
        kernel = self.world.kernel
        self.striker.plan(self._faults)
        end = max([fault.at for fault in self._faults], default=8.0) + kernel.random.uniform(0.0, 4.0)
        kernel.at(kernel.random.uniform(0.0, 6.0), self._arrive)
        kernel.run_until(end)
        self._load = False
        self.striker.stop()
        self.world.heal()
        self._expect_health(kernel.now + self._healed_within_s + self.world.shape.elastic * GROWN_WITHIN_S)
        self._expect_service()

    def _arrive(self) -> None:
        """Clients come and go all the time."""
        kernel, gateways = self.world.kernel, self.world.gateways()
        if not self._load:
            return
        if gateways:
            self.world.crowd.make(kernel.random.choice(gateways))
        kernel.after(kernel.random.expovariate(3.0), self._arrive)

    def _expect_health(self, deadline: float) -> None:
        kernel, begun = self.world.kernel, self.world.kernel.now
        while (ailment := self._ailment()) is not None:
            assert kernel.now < deadline, f"not healthy {self._healed_within_s:g} s after healing: {ailment}"
            for name in self.world.hosts():
                # One that was told to go and left after all was healed.
                self.world.restart(name)
            if self._needs_operator():
                self._operate()
            kernel.run_until(kernel.now + LOOK_S)
        self.healed_s = kernel.now - begun
        kernel.tell("world", "healthy", after=f"{self.healed_s:.1f}")

    def _needs_operator(self) -> bool:
        """Somebody waits for a person by design: a spent budget, a drained node, a wish that no leader heard."""
        world, leader = self.world, self.world.leader()
        if leader is None or leader.state is None:
            return False
        state = leader.state
        degraded = any(replica.phase in GIVEN_UP for replica in state.replicas.values())
        drained = any(node.phase in (NodePhase.DRAINING, NodePhase.LEFT) for node in state.nodes.values())
        unheard = all(one.record != world.wanted for one in state.deployments.values())
        return degraded or drained or unheard

    def _operate(self) -> None:
        """What an operator does after a bad night: take drained nodes back, and ask again for what is wanted."""
        for name in self.world.workers:
            self.world.ask_leader(UndrainAsked(NodeId(name)))
        self.world.ask_leader(ApplyAsked(self.world.wanted))

    def _expect_service(self) -> None:
        """New requests are served in full, through every gateway."""
        probes = [self.world.crowd.make(gateway) for gateway in self.world.gateways() for _ in range(PROBES)]
        deadline = self.world.kernel.now + self._healed_within_s / 3
        while any(probe.open for probe in probes) or self._ailment() is not None:
            assert self.world.kernel.now < deadline, f"probes are not served: {self._ailment()}"
            self.world.kernel.run_until(self.world.kernel.now + LOOK_S)
        failed = [f"{probe.request}: {probe.outcome}" for probe in probes if probe.outcome not in ("finished", "left")]
        assert not failed, f"probes failed in a healthy world: {failed}"

    def _ailment(self) -> str | None:
        """Why all is not well yet."""
        world = self.world
        leaders = world.leaders()
        if len(leaders) != 1:
            return f"{len(leaders)} lead"
        state = leaders[0].state
        assert state is not None
        if open_now := world.crowd.open():
            return f"{len(open_now)} requests are open, {open_now[0].request} for one"
        for replica in state.replicas.values():
            if replica.phase is not ReplicaPhase.READY and not self._has_no_room(len(state.replicas)):
                return f"{replica.replica} is {replica.phase.name}: {replica.reason.text if replica.reason else ''}"
        if (whole := self._whole(state)) < self._expected():
            return f"{whole} replicas serve with all their ranks"
        if state.requests:
            return f"the leader still counts {sorted(state.requests)[:3]}"
        if (ready := self._spares_ready(state)) < (wanted := self._spares_wanted(state)):
            return f"{ready} of {wanted} spares are ready"
        return world.safety.leftovers()

    def _whole(self, state: ClusterState) -> int:
        """Replicas that serve, and are not shrunk."""
        ready = [replica for replica in state.replicas.values() if replica.phase is ReplicaPhase.READY]
        return sum(not is_shrunk(state.deployments[replica.deployment].record, replica) for replica in ready)

    def _spares_wanted(self, state: ClusterState) -> int:
        """While a replica has no place, spares stay as they are: it may need them."""
        if self.world.wanted.replicas > self.world.shape.room:
            return 0
        return min(self.world.wanted.spares, sum(len(node.free) for node in free_nodes(state)))

    def _spares_ready(self, state: ClusterState) -> int:
        """Those that the leader calls ready, and that hold what they are to hold."""
        return sum(
            spare.ready and self.world.house.holds(node.node, device, spare.spec, spare.rank)
            for node in state.nodes.values()
            for device, spare in node.spares.items()
        )

    def _expected(self) -> int:
        return min(self.world.wanted.replicas, self.world.shape.room)

    def _has_no_room(self, replicas: int) -> bool:
        return replicas > self._expected()
