"""What can go wrong, as data: a schedule of faults that can be written down, read again, and cut shorter.

One fault a line: `at kind target [value] [for seconds]`. A target is a process ("w1", "cp2"), a rank ("w1/cpu:0"), two
hosts ("w1>cp1" one way, "w1-cp1" both ways; "etcd" is one of them), "leader" for whoever leads then, or "-".
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

NONE = "-"


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing that goes wrong at `at` seconds; for faults that end, `lasts` seconds."""

    at: float
    kind: str
    target: str = NONE
    value: float = 0.0
    lasts: float = 0.0

    def __str__(self) -> str:
        value = f" {self.value:g}" if self.value else ""
        return f"{self.at:.3f} {self.kind} {self.target}{value}" + (f" for {self.lasts:.3f}" if self.lasts else "")


def parse_fault(line: str) -> Fault:
    """The fault that `str` wrote. Raises ValueError."""
    words = line.split()
    lasts = 0.0
    if "for" in words:
        at = words.index("for")
        lasts, words = float(words[at + 1]), words[:at]
    value = float(words[3]) if len(words) > 3 else 0.0
    return Fault(float(words[0]), words[1], words[2], value, lasts)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault: how often it is drawn, what it strikes, how long it lasts and how strong it is."""

    name: str
    weight: float
    target: str
    lasts: tuple[float, float] = (0.0, 0.0)
    value: tuple[float, float] = (0.0, 0.0)


KINDS = (
    Kind("kill", 6, "process", (0.0, 6.0)),
    Kind("kill_late", 2, "process", (0.5, 6.0), (0.1, 1.0)),
    Kind("lose_machine", 2, "process", (2.0, 8.0)),
    Kind("kill", 3, "leader", (0.2, 6.0)),
    Kind("stop", 4, "process", (0.1, 6.0)),
    Kind("stop", 2, "leader", (0.5, 6.0)),
    Kind("hang", 2, "process", (0.2, 4.0)),
    Kind("hang", 1, "leader", (0.5, 4.0)),
    Kind("jump", 2, "process", value=(0.1, 5.0)),
    Kind("cut", 4, "pair", (0.1, 6.0)),
    Kind("cut_etcd", 3, "process", (0.2, 6.0)),
    Kind("cut_etcd", 2, "leader", (0.2, 6.0)),
    Kind("isolate", 2, "process", (0.5, 6.0)),
    Kind("isolate", 1, "leader", (0.5, 6.0)),
    Kind("break", 4, "process"),
    Kind("break", 2, "leader"),
    Kind("slow", 2, "process", (0.5, 5.0), (0.02, 0.4)),
    Kind("lag", 2, "process", (0.5, 5.0), (0.05, 0.6)),
    Kind("reject", 2, "process", (0.02, 3.0)),
    Kind("reject_break", 2, "process", (0.02, 0.04)),
    Kind("etcd_down", 2, NONE, (0.2, 8.0)),
    Kind("etcd_slow", 2, NONE, (0.5, 5.0), (0.1, 1.5)),
    Kind("etcd_read_only", 1, NONE, (0.5, 6.0)),
    Kind("etcd_restore", 1, NONE),
    Kind("etcd_snapshot", 2, NONE),
    Kind("etcd_compact", 1, NONE),
    Kind("etcd_drop_watches", 2, NONE),
    Kind("revoke_lease", 2, "process"),
    Kind("rank_kill", 4, "rank", value=(0.0, 1.0)),
    Kind("rank_crash", 3, "rank", value=(0.0, 1.0)),
    Kind("rank_stop", 2, "rank", (0.5, 8.0)),
    Kind("rank_stick", 2, "rank", (0.5, 8.0)),
    Kind("rank_slow", 1, "rank", (0.5, 5.0), (2.0, 30.0)),
    Kind("rank_lie", 1, "rank"),
    Kind("forks_fail", 1, NONE, (0.2, 3.0)),
    Kind("drain", 2, "worker", (1.0, 8.0)),
    Kind("leave", 2, "worker", (1.0, 8.0)),
    Kind("scale", 2, NONE, value=(1, 4)),
    Kind("poison", 1, NONE),
    Kind("burst", 2, NONE, value=(5, 40)),
)

CLOSE_S = 0.4
"""A fault that follows another this closely strikes while the first is being dealt with."""
CLOSE_SHARE = 0.4


def draw_schedule(
    seed: int, hosts: tuple[list[str], list[str]], devices: int, begin: float, end: float, kinds: tuple[Kind, ...] = ()
) -> list[Fault]:
    """The faults of a seed between `begin` and `end`; `hosts` are control planes and workers. Without `kinds` the seed
    draws them too: all, or a few only, for what many kinds at once would hide."""
    random = Random(f"faults {seed}")
    gap = random.choice((0.7, 1.5, 3.0, 6.0))
    if not kinds:
        kinds = KINDS if random.random() < 0.5 else tuple(random.sample(KINDS, random.randrange(2, 9)))
    faults: list[Fault] = []
    at = begin + random.expovariate(1 / gap)
    while at < end:
        kind = random.choices(kinds, [kind.weight for kind in kinds])[0]
        target = _target(kind, random, hosts, devices)
        value = round(random.uniform(*kind.value), 3 if kind.name != "scale" else 0)
        faults.append(Fault(round(at, 3), kind.name, target, value, round(random.uniform(*kind.lasts), 3)))
        at += random.uniform(0, CLOSE_S) if random.random() < CLOSE_SHARE else random.expovariate(1 / gap)
    return faults


def _target(kind: Kind, random: Random, hosts: tuple[list[str], list[str]], devices: int) -> str:
    control_planes, workers = hosts
    match kind.target:
        case "process":
            return random.choice([*control_planes, *workers])
        case "worker":
            return random.choice(workers)
        case "rank":
            return f"{random.choice(workers)}/cpu:{random.randrange(devices)}"
        case "pair":
            one, other = random.sample([*control_planes, *workers], 2)
            return f"{one}{random.choice('>-')}{other}"
        case _:
            return kind.target
