"""What can go wrong, as data: a schedule of faults that can be written down, read again, and cut shorter.

One fault a line: `at kind target [value] [for seconds] [upon event delay]`. A target is a process ("w1", "cp2"), a
rank ("w1/cpu:0"), two hosts ("w1>cp1" one way, "w1-cp1" both ways; "etcd" is one of them), "leader" for whoever leads
then, or "-". With `upon` it waits, from `at` on, for the next line of the story with that event, and strikes `delay`
seconds after it: in the midst of an election, a regroup, a load, a drain, a change of scale.
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
    # The event of the story that it waits for, and how long after it the fault strikes.
    upon: str = ""
    delay: float = 0.0

    def __str__(self) -> str:
        value = f" {self.value:g}" if self.value else ""
        lasts = f" for {self.lasts:.3f}" if self.lasts else ""
        upon = f" upon {self.upon} {self.delay:.3f}" if self.upon else ""
        return f"{self.at:.3f} {self.kind} {self.target}{value}{lasts}{upon}"


def parse_fault(line: str) -> Fault:
    """The fault that `str` wrote. Raises ValueError, naming the line."""
    try:
        fault = _parse(line.split())
    except (IndexError, ValueError) as error:
        raise ValueError(f"{line!r} is no fault: at kind target [value] [for seconds] [upon event delay]") from error
    if fault.kind not in {kind.name for kind in KINDS}:
        raise ValueError(f"{line!r}: {fault.kind} is no kind of fault")
    return fault


def _parse(words: list[str]) -> Fault:
    upon, delay, lasts = "", 0.0, 0.0
    if "upon" in words:
        at = words.index("upon")
        upon, delay, words = words[at + 1], float(words[at + 2]), words[:at]
    if "for" in words:
        at = words.index("for")
        lasts, words = float(words[at + 1]), words[:at]
    value = float(words[3]) if len(words) > 3 else 0.0
    return Fault(float(words[0]), words[1], words[2], value, lasts, upon, delay)


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
    Kind("pause", 2, "process", (0.1, 12.0)),
    Kind("pause_all", 1, NONE, (0.5, 20.0)),
    Kind("hang", 2, "process", (0.2, 4.0)),
    Kind("hang", 1, "leader", (0.5, 4.0)),
    Kind("jump", 2, "process", value=(0.1, 5.0)),
    Kind("cut", 4, "pair", (0.1, 6.0)),
    Kind("cut_etcd", 3, "process", (0.2, 6.0)),
    Kind("cut_etcd", 2, "leader", (0.2, 6.0)),
    Kind("isolate", 2, "process", (0.5, 6.0)),
    Kind("isolate", 1, "leader", (0.5, 6.0)),
    Kind("unplug", 2, "process", (0.5, 9.0)),
    Kind("break", 4, "process"),
    Kind("break", 2, "leader"),
    Kind("break_half", 2, "process"),
    Kind("break_half", 1, "leader"),
    Kind("slow", 2, "process", (0.5, 5.0), (0.02, 0.4)),
    Kind("lag", 2, "process", (0.5, 5.0), (0.05, 0.6)),
    Kind("lose", 2, "process", (0.5, 6.0), (0.02, 0.5)),
    Kind("double", 1, "process", (0.5, 6.0), (0.1, 1.0)),
    Kind("jitter", 2, "process", (0.5, 6.0), (0.05, 0.5)),
    Kind("reject", 2, "process", (0.02, 3.0)),
    Kind("reject_break", 2, "process", (0.02, 0.04)),
    Kind("etcd_down", 2, NONE, (0.2, 8.0)),
    Kind("etcd_election", 2, NONE, (0.2, 3.0)),
    Kind("etcd_slow", 2, NONE, (0.5, 5.0), (0.1, 1.5)),
    Kind("etcd_fail", 2, NONE, (0.5, 6.0), (0.1, 1.0)),
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
    Kind("rank_lie", 2, "rank"),
    Kind("rank_late", 2, "rank", (0.5, 6.0), (0.05, 1.5)),
    Kind("forks_fail", 1, NONE, (0.2, 3.0)),
    Kind("drain", 2, "worker", (1.0, 8.0)),
    Kind("leave", 2, "process", (1.0, 8.0)),
    Kind("leave", 1, "leader", (1.0, 8.0)),
    Kind("scale", 2, NONE, value=(0, 4)),
    Kind("respec", 2, NONE, value=(2, 5)),
    Kind("poison", 1, NONE),
    Kind("burst", 2, NONE, value=(5, 40)),
)
COUNTS = frozenset({"scale", "respec", "burst"})
"""Their strength is a whole number."""

CLOSE_S = 0.4
"""A fault that follows another this closely strikes while the first is being dealt with."""
CLOSE_SHARE = 0.4

UPON = (
    # elections
    "lease_expired",
    "leader_proven_dead",
    "leads",
    "leads_no_more",
    "leader_leading",
    "leader_frozen",
    # a replica comes up, stage by stage, and goes
    "replica_planned",
    "rank_prepared",
    "rank_formed",
    "rank_loading",
    "replica_ready",
    "replica_closed",
    # planned changes
    "node_draining",
    "replica_draining",
    "requests_moved",
    "deployment_changed",
    "drain_begun",
    # who comes, goes, and goes on
    "session_begun",
    "node_unreachable",
    "node_lost",
    "request_moved",
    "request_resumed",
)
"""Events in whose wake faults are drawn."""
UPON_SHARE = 0.25
UPON_DELAY_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""How long after the event: from before anybody has heard of it to when it is half dealt with."""


def draw_schedule(
    seed: int, hosts: tuple[list[str], list[str]], devices: int, begin: float, end: float, kinds: tuple[Kind, ...] = ()
) -> list[Fault]:
    """The faults of a seed between `begin` and `end`; `hosts` are control planes and workers. Without `kinds` the seed
    draws them too: all, or a few only, for what many kinds at once would hide."""
    random = Random(f"faults {seed}")
    gap = random.choice((0.7, 1.5, 3.0, 6.0))
    upon_share = 0.0 if kinds else UPON_SHARE
    if not kinds:
        kinds = KINDS if random.random() < 0.5 else tuple(random.sample(KINDS, random.randrange(2, 9)))
    faults: list[Fault] = []
    at = begin + random.expovariate(1 / gap)
    while at < end:
        kind = random.choices(kinds, [kind.weight for kind in kinds])[0]
        target = _target(kind, random, hosts, devices)
        value = round(random.uniform(*kind.value), 0 if kind.name in COUNTS else 3)
        lasts = round(random.uniform(*kind.lasts), 3)
        upon, delay = "", 0.0
        if upon_share and random.random() < upon_share:
            upon, delay = random.choice(UPON), random.choice(UPON_DELAY_S)
        faults.append(Fault(round(at, 3), kind.name, target, value, lasts, upon, delay))
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
