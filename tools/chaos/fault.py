"""What is done to whom, as a plan writes it."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Action(Enum):
    """What is done."""

    # To a process.
    KILL = "kill"
    STOP = "stop"
    TERMINATE = "terminate"
    # By the leader.
    DRAIN = "drain"
    UNDRAIN = "undrain"
    # To a host's cable: nothing passes; what it sends, or what is sent to it, is lost; the link is down.
    CUT = "cut"
    MUTE = "mute"
    DEAFEN = "deafen"
    LOSE = "lose"
    DELAY = "delay"
    UNPLUG = "unplug"
    # To a host's disk: it is full; etcd's answers late. To its wall clock. To its processor: it gets some of it.
    FILL = "fill"
    LAG = "lag"
    JUMP = "jump"
    SLOW = "slow"
    # To a machine: whatever runs there stands still at once, as when its host pauses it or gives it no processor.
    FREEZE = "freeze"
    # To etcd as a whole: take a snapshot; start all members from it; forget all that is past.
    SAVE = "save"
    RESTORE = "restore"
    COMPACT = "compact"
    # To etcd's clients: it demands a user and a password, which they do not have.
    DENY = "deny"
    # To what is desired: so many replicas; the same model from another folder.
    SCALE = "scale"
    RELOAD = "reload"
    # Ends whatever runs one certain request, each time it runs anew.
    POISON = "poison"
    # One daemon after the other, etcd too.
    RESTART = "restart"


UNNAMED = ("leader", "standby", "etcd", "request", "everything")
NAMED = ("rank", "node", "nodes", "worker", "zygote", "controlplane", "etcd", "deployment")
NUMBERED = ("rank", "node")

_DAEMONS = frozenset({"worker", "node", "nodes", "controlplane", "leader", "standby", "etcd"})
_PROCESSES = _DAEMONS | {"rank", "zygote"}
_CABLES = frozenset({Action.CUT, Action.MUTE, Action.DEAFEN, Action.LOSE, Action.DELAY})
_TARGETS: dict[Action, frozenset[str]] = {
    Action.KILL: _PROCESSES,
    Action.STOP: _PROCESSES,
    Action.TERMINATE: _PROCESSES,
    Action.DRAIN: frozenset({"worker", "node", "nodes"}),
    Action.UNDRAIN: frozenset({"worker", "everything"}),
    **dict.fromkeys(_CABLES, _DAEMONS),
    Action.UNPLUG: _DAEMONS,
    Action.FILL: _DAEMONS,
    Action.LAG: frozenset({"etcd"}),
    Action.SLOW: frozenset({"rank"}),
    Action.JUMP: _DAEMONS | {"everything"},
    Action.FREEZE: _DAEMONS | {"everything"},
    Action.SAVE: frozenset({"etcd"}),
    Action.RESTORE: frozenset({"etcd"}),
    Action.COMPACT: frozenset({"etcd"}),
    Action.DENY: frozenset({"etcd"}),
    Action.SCALE: frozenset({"deployment"}),
    Action.RELOAD: frozenset({"deployment"}),
    Action.POISON: frozenset({"request"}),
    Action.RESTART: frozenset({"everything"}),
}
_DISTURBING = _CABLES | {Action.UNPLUG, Action.FILL, Action.LAG}
"""Of hosts, and undone after a while."""

_LASTING = _DISTURBING | {Action.SLOW, Action.DENY, Action.FREEZE}
"""Undone after a while."""

_NEED_HOSTS = _DISTURBING | {
    Action.JUMP,
    Action.FREEZE,
    Action.SAVE,
    Action.RESTORE,
    Action.COMPACT,
    Action.DENY,
    Action.RELOAD,
    Action.RESTART,
}
_ETCD_AS_A_WHOLE = frozenset(
    {Action.KILL, Action.STOP, Action.TERMINATE, Action.SAVE, Action.RESTORE, Action.COMPACT, Action.DENY}
)


class Strict(BaseModel):
    """Takes no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(Strict):
    """Somebody by what it is: `rank main-0`, `rank main-0/1`, `node main-0/1` (the worker daemon of that rank),
    `nodes main-0` (those of all its ranks), `worker worker-0`, `zygote worker-0`, `controlplane cp-0`, `leader`,
    `standby` (a control plane that does not lead), `etcd` (all members), `etcd etcd-0`, `deployment main`,
    `everything`."""

    kind: str
    name: str = ""
    rank: int = 0

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError("a target is text, such as 'rank main-0' or 'leader'")
        kind, _, name = value.partition(" ")
        if kind not in UNNAMED + NAMED:
            raise ValueError(f"unknown target {value!r}: one of {', '.join(dict.fromkeys(UNNAMED + NAMED))}")
        if name and kind not in NAMED:
            raise ValueError(f"{kind!r} takes no name: {value!r}")
        if not name and kind not in UNNAMED:
            raise ValueError(f"{kind!r} takes a name: {value!r}")
        rank = 0
        if kind in NUMBERED and "/" in name:
            name, _, number = name.partition("/")
            if not number.isdigit():
                raise ValueError(f"the rank in {value!r} is no number")
            rank = int(number)
        return {"kind": kind, "name": name, "rank": rank}

    def __str__(self) -> str:
        name = f"{self.name}/{self.rank}" if self.kind in NUMBERED else self.name
        return f"{self.kind} {name}".strip()


class Fault(Strict):
    """One thing that is done, once all streams had `at` events, and `after` seconds later."""

    at: Annotated[int, Field(ge=0)] = 30
    after: Annotated[float, Field(ge=0)] = 0.0
    # "loading main-0", "regrouping main-0": and not before that replica is so far.
    when: Annotated[str, Field(pattern=r"^((loading|regrouping) \S+)?$")] = ""
    action: Action
    target: Target
    # Of a stop, until it goes on; of a kill, until it is started again; of a cable, until it is whole; of a jump, until
    # the clock is set right. 0: for good, or as soon as its supervisor starts it again.
    seconds: Annotated[float, Field(ge=0)] = 0.0
    # Of a cable: to whom. A host's name, or all hosts of a kind.
    peers: Annotated[str, Field(alias="from")] = "everybody"
    # Of `lose`: how much is lost; of `slow`: how much of the time it stands still.
    percent: Annotated[int, Field(ge=1, le=100)] = 100
    # Of `delay`: each way; of `lag`: each write that is to be safe on the disk.
    milliseconds: Annotated[int, Field(ge=1, le=10_000)] = 100
    # Of `jump`: forward.
    hours: float = 1.0
    # Of `scale`.
    replicas: Annotated[int, Field(ge=0)] = 1
    # Done so often, the next one so many seconds after the last began.
    times: Annotated[int, Field(ge=1)] = 1
    every: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("a fault is a mapping, such as {at: 30, kill: leader}")
        named = [action.value for action in Action if action.value in value]
        if len(named) != 1:
            raise ValueError(f"a fault names one of {', '.join(action.value for action in Action)}")
        rest = {key: item for key, item in value.items() if key != named[0]}
        return {**rest, "action": named[0], "target": value[named[0]]}

    @model_validator(mode="after")
    def _check(self) -> Fault:
        action = self.action
        if self.target.kind not in _TARGETS[action]:
            raise ValueError(f"{self.target} cannot be met by {action.value!r}: {', '.join(sorted(_TARGETS[action]))}")
        if self.target.kind == "etcd" and not self.target.name and action not in _ETCD_AS_A_WHOLE:
            raise ValueError(f"{action.value!r} takes one member of etcd by its name")
        if self.seconds and action not in _LASTING | {Action.STOP, Action.KILL, Action.JUMP}:
            raise ValueError(f"{action.value!r} takes no seconds")
        if self.seconds and action is Action.KILL and self.target.kind not in _DAEMONS:
            raise ValueError(f"only a daemon stays away for seconds, not a {self.target.kind}")
        if action is Action.SLOW and self.percent == 100:
            raise ValueError("'slow' takes a percent below 100: one that stands still is stopped")
        if not self.seconds and action in _LASTING:
            raise ValueError(f"{action.value!r} takes seconds")
        if self.peers != "everybody" and action not in _CABLES:
            raise ValueError(f"{action.value!r} takes no from")
        return self

    @property
    def needs_hosts(self) -> bool:
        """Only a cluster that chaos itself runs, each daemon on a host of its own, can be met so."""
        return (
            self.action in _NEED_HOSTS
            or (self.action is Action.KILL and self.seconds > 0)
            or (self.target.kind == "etcd" and bool(self.target.name))
        )

    def __str__(self) -> str:
        parts = [self.action.value, str(self.target)]
        if self.action in (Action.LOSE, Action.SLOW):
            parts.append(f"{self.percent} %")
        if self.action in (Action.DELAY, Action.LAG):
            parts.append(f"by {self.milliseconds} ms")
        if self.action is Action.JUMP:
            parts.append(f"by {self.hours:g} h")
        if self.action is Action.SCALE:
            parts.append(f"to {self.replicas}")
        if self.peers != "everybody":
            parts.append(f"from {self.peers}")
        if self.seconds:
            parts.append(f"for {self.seconds:g} s")
        if self.times > 1:
            parts.append(f"{self.times} times")
        if self.when:
            parts.append(f"while {self.when}")
        return " ".join(parts)
