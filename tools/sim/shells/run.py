"""One run of one seed over the real shells: faults under load, then healing, then everything must come right; at the
end all processes are told to go, and nothing may be left of them."""

from __future__ import annotations

import asyncio
import gc
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from tools.sim.quiet import quiet
from tools.sim.shells.faults import Fault, draw_faults, strike
from tools.sim.shells.watch import in_memory
from tools.sim.shells.world import ENDS_WITHIN_S, ShellWorld
from tools.sim.world import Shape

WARM_S = 3.0
FAULTS_S = 12.0
ARRIVALS_A_S = 4.0
HEALED_WITHIN_S = 60.0
CLOSING_ROUNDS = 100
"""Enough for every task to get through all of its clean-up."""
LOOK_S = 0.5
CAPACITIES = (1, 2, 4, 64, 16_384)
"""Of the coordinator's mailbox: a full one makes senders wait."""
FRAMES = (128, 4096)
"""Of outboxes; one that is full ends its stream."""


@dataclass(slots=True)
class Outcome:
    """What came of a seed."""

    seed: int
    faults: list[Fault]
    # "" if all was well.
    error: str = ""
    trace: str = ""
    story: list[str] = field(default_factory=list[str])
    digest: str = ""
    outcomes: Counter[str] = field(default_factory=Counter[str])
    virtual_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.error


def shape_of(random: Random) -> Shape:
    workers = random.choice((1, 2, 3))
    return Shape(control_planes=random.choice((1, 2, 3)), workers=workers, devices=1, replicas=workers)


def run_seed(seed: int, healed_within_s: float = HEALED_WITHIN_S) -> Outcome:
    """Run the seed's own schedule."""
    random = Random(f"shells {seed}")
    shape = shape_of(random)
    faults = draw_faults(random, shape, WARM_S, WARM_S + FAULTS_S)
    outcome = Outcome(seed, faults)
    begun = time.thread_time()
    world = ShellWorld(seed, shape)
    capacity, frames = random.choice(CAPACITIES), random.choice(FRAMES)
    with quiet(), world.sleepers.watching(), in_memory(world.wires, world.dice(), capacity, frames):
        try:
            world.loop.run_until_complete(_play(world, faults, healed_within_s))
            gc.collect()
        except Exception as error:  # noqa: BLE001 - whatever breaks is what was looked for
            broke = world.failed or error
            outcome.error = f"{type(broke).__name__}: {broke}"
            outcome.trace = "".join(traceback.format_exception(broke))
        finally:
            _close(world)
    if world.failed is not None and outcome.ok:
        outcome.error = f"{type(world.failed).__name__}: {world.failed}"
    outcome.story, outcome.digest = list(world.story.lines), world.story.digest
    outcome.outcomes = Counter(client.outcome for client in world.crowd.clients)
    outcome.virtual_s, outcome.cpu_s = world.kernel.now, time.thread_time() - begun
    return outcome


async def _play(world: ShellWorld, faults: list[Fault], healed_within_s: float) -> None:
    kernel = world.kernel
    world.begin()
    for fault in faults:
        kernel.at(fault.at, strike, world, fault)
    while kernel.now < WARM_S + FAULTS_S:
        if hosts := world.control_planes():
            world.crowd.send(kernel.random.choice(hosts))
        await asyncio.sleep(kernel.random.expovariate(ARRIVALS_A_S))
    _heal(world)
    await _expect_health(world, healed_within_s)
    for host in world.control_planes():
        world.crowd.send(host)
    await asyncio.sleep(LOOK_S)
    await _expect_health(world, healed_within_s)
    world.over = True
    for name in world.hosts:
        world.stop(name)
    await asyncio.sleep(2 * ENDS_WITHIN_S + LOOK_S)
    left = [name for name, host in world.hosts.items() if not host.main.done()]
    assert not left, f"{left} were told to go and are still there"


def _heal(world: ShellWorld) -> None:
    world.kernel.tell("world", "healed")
    world.wires.heal_all()
    world.etcd.delay_s = 0.0
    world.etcd_up()
    for name in list(world.hosts):
        world.start(name)


async def _expect_health(world: ShellWorld, within_s: float) -> None:
    deadline, looks = world.kernel.now + within_s, 0
    while (ailment := world.ailment()) is not None:
        assert world.kernel.now < deadline, f"not healthy {within_s:g} s after healing: {ailment}"
        looks += 1
        if looks % 10 == 0:
            world.operate()
        for name in list(world.hosts):
            world.start(name)
        await asyncio.sleep(LOOK_S)
    world.kernel.tell("world", "healthy")


def _close(world: ShellWorld) -> None:
    """Nothing of a broken run may speak up later."""
    world.loop.set_exception_handler(lambda loop, context: None)
    for _ in range(CLOSING_ROUNDS):
        for task in list(world.loop.tasks):
            task.cancel()
        world.loop.call_soon(world.loop.stop)
        world.loop.run_forever()
    world.loop.close()
