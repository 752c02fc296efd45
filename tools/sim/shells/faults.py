"""What strikes the shells: deaths, departures, streams that break or stall, an etcd that is slow or away."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from tools.sim.world import Shape

if TYPE_CHECKING:
    from tools.sim.shells.world import ShellWorld

ETCD_HOST = "etcd"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault at `at` seconds, lasting `lasts` seconds if it is of a kind that ends."""

    at: float
    kind: str
    target: str
    lasts: float

    def __str__(self) -> str:
        return f"{self.at:.3f} {self.kind} {self.target} for {self.lasts:.3f}"


KINDS = {
    "kill": (3, 0.1, 5.0),
    "leave": (2, 0.5, 5.0),
    "break": (4, 0.0, 0.0),
    # Shorter than anybody's patience: writers must wait and go on.
    "stall": (4, 0.05, 1.2),
    "cut": (2, 1.5, 6.0),
    "slow": (2, 0.5, 4.0),
    "etcd_down": (1, 0.2, 6.0),
    "etcd_slow": (2, 0.5, 4.0),
    "etcd_drop_watches": (2, 0.0, 0.0),
    "etcd_compact": (1, 0.0, 0.0),
    "burst": (2, 0.0, 0.0),
    "rank_kill": (3, 0.0, 0.0),
}
"""Weight, and how long it lasts at least and at most."""
BURST = 40
SLOW_S = 0.3
ETCD_SLOW_S = 0.4
PAIR = ("stall", "cut")


def draw_faults(random: Random, shape: Shape, begin: float, end: float) -> list[Fault]:
    """A schedule between `begin` and `end`."""
    hosts = [f"cp{n + 1}" for n in range(shape.control_planes)] + [f"w{n + 1}" for n in range(shape.workers)]
    names = list(KINDS)
    gap, at, faults = random.choice((0.5, 1.5)), begin, list[Fault]()
    while (at := at + random.expovariate(1 / gap)) < end:
        kind = random.choices(names, [KINDS[name][0] for name in names])[0]
        _, least, most = KINDS[kind]
        pair = random.sample([*hosts, ETCD_HOST], 2)
        target = "-".join(pair) if kind in PAIR else random.choice(hosts)
        faults.append(Fault(at, kind, target, random.uniform(least, most)))
    return faults


def strike(world: ShellWorld, fault: Fault) -> None:
    """Do it, and arrange for its end."""
    world.kernel.tell("fault", fault.kind, target=fault.target, lasts=f"{fault.lasts:.3f}")
    after, target = world.kernel.after, fault.target
    match fault.kind:
        case "kill" | "leave":
            (world.kill if fault.kind == "kill" else world.stop)(target)
            after(fault.lasts, world.start, target)
        case "break":
            world.wires.break_calls(target)
        case "stall" | "cut":
            one, other = target.split("-")
            world.wires.cut(one, other)
            after(fault.lasts, world.wires.heal, one, other)
        case "slow":
            world.wires.slow[target] = SLOW_S
            after(fault.lasts, world.wires.hurry, target)
        case "etcd_down":
            world.etcd_down()
            after(fault.lasts, world.etcd_up)
        case "etcd_slow":
            world.etcd.delay_s = ETCD_SLOW_S
            after(fault.lasts, setattr, world.etcd, "delay_s", 0.0)
        case "etcd_drop_watches":
            world.etcd.drop_watches()
        case "etcd_compact":
            world.etcd.compact()
        case "burst":
            for _ in range(BURST):
                if hosts := world.control_planes():
                    world.crowd.send(world.kernel.random.choice(hosts))
        case "rank_kill":
            ranks = [rank for rank in world.house.all if rank.alive]
            if ranks:
                world.kernel.random.choice(ranks).die(signal=9)
        case _:
            raise AssertionError(fault.kind)
