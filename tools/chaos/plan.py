"""The plan file: which faults, when, to whom."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class PlanError(Exception):
    """The plan cannot be used; the text names the file and what is wrong."""


class Action(Enum):
    """What is done."""

    # To a process.
    KILL = "kill"
    STOP = "stop"
    TERMINATE = "terminate"
    # By the leader.
    DRAIN = "drain"
    # To a host's cable: nothing passes; what it sends, or what is sent to it, is lost; the link is down.
    CUT = "cut"
    MUTE = "mute"
    DEAFEN = "deafen"
    LOSE = "lose"
    DELAY = "delay"
    UNPLUG = "unplug"
    # To a host's disk and its wall clock.
    FILL = "fill"
    JUMP = "jump"
    # To etcd as a whole: take a snapshot; start all members from it.
    SAVE = "save"
    RESTORE = "restore"
    # Ends whatever runs one certain request, each time it runs anew.
    POISON = "poison"
    # One daemon after the other, etcd too.
    RESTART = "restart"


UNNAMED = ("leader", "standby", "etcd", "request", "everything")
NAMED = ("rank", "worker", "zygote", "controlplane", "etcd")

_DAEMONS = frozenset({"worker", "controlplane", "leader", "standby", "etcd"})
_PROCESSES = _DAEMONS | {"rank", "zygote"}
_CABLES = frozenset({Action.CUT, Action.MUTE, Action.DEAFEN, Action.LOSE, Action.DELAY})
_TARGETS: dict[Action, frozenset[str]] = {
    Action.KILL: _PROCESSES,
    Action.STOP: _PROCESSES,
    Action.TERMINATE: _PROCESSES,
    Action.DRAIN: frozenset({"worker"}),
    **dict.fromkeys(_CABLES, _DAEMONS),
    Action.UNPLUG: _DAEMONS,
    Action.FILL: _DAEMONS,
    Action.JUMP: _DAEMONS | {"everything"},
    Action.SAVE: frozenset({"etcd"}),
    Action.RESTORE: frozenset({"etcd"}),
    Action.POISON: frozenset({"request"}),
    Action.RESTART: frozenset({"everything"}),
}
_LASTING = _CABLES | {Action.UNPLUG, Action.FILL}
"""Undone after a while."""

_NEED_HOSTS = _LASTING | {Action.JUMP, Action.SAVE, Action.RESTORE, Action.RESTART}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(_Strict):
    """Somebody by what it is: `rank main-0`, `rank main-0/1`, `worker worker-0`, `zygote worker-0`,
    `controlplane cp-0`, `leader`, `standby` (a control plane that does not lead), `etcd` (all members),
    `etcd etcd-0`, `everything`."""

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
        if kind == "rank" and "/" in name:
            name, _, number = name.partition("/")
            if not number.isdigit():
                raise ValueError(f"the rank in {value!r} is no number")
            rank = int(number)
        return {"kind": kind, "name": name, "rank": rank}

    def __str__(self) -> str:
        name = f"{self.name}/{self.rank}" if self.kind == "rank" else self.name
        return f"{self.kind} {name}".strip()


class Fault(_Strict):
    """One thing that is done, once all streams had `at` events, and `after` seconds later."""

    at: Annotated[int, Field(ge=0)] = 30
    after: Annotated[float, Field(ge=0)] = 0.0
    # "loading main-0", "regrouping main-0": and not before that replica is so far.
    when: Annotated[str, Field(pattern=r"^((loading|regrouping) \S+)?$")] = ""
    action: Action
    target: Target
    # Of a stop, until it goes on; of a kill, until it is started again; of a cable, until it is whole. 0: for good,
    # or as soon as its supervisor starts it again.
    seconds: Annotated[float, Field(ge=0)] = 0.0
    # Of a cable: to whom. A host's name, or all hosts of a kind.
    peers: Annotated[str, Field(alias="from")] = "everybody"
    # Of `lose`: how much.
    percent: Annotated[int, Field(ge=1, le=100)] = 100
    # Of `delay`: each way.
    milliseconds: Annotated[int, Field(ge=1, le=10_000)] = 100
    # Of `jump`: forward.
    hours: float = 1.0
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
        if self.target.kind == "etcd" and not self.target.name and action in _LASTING:
            raise ValueError(f"{action.value!r} takes one member of etcd by its name")
        if self.seconds and action not in _LASTING | {Action.STOP, Action.KILL}:
            raise ValueError(f"{action.value!r} takes no seconds")
        if self.seconds and action is Action.KILL and self.target.kind not in _DAEMONS:
            raise ValueError(f"only a daemon stays away for seconds, not a {self.target.kind}")
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
        if self.action is Action.LOSE:
            parts.append(f"{self.percent} %")
        if self.action is Action.DELAY:
            parts.append(f"by {self.milliseconds} ms")
        if self.action is Action.JUMP:
            parts.append(f"by {self.hours:g} h")
        if self.peers != "everybody":
            parts.append(f"from {self.peers}")
        if self.seconds:
            parts.append(f"for {self.seconds:g} s")
        if self.times > 1:
            parts.append(f"{self.times} times")
        if self.when:
            parts.append(f"while {self.when}")
        return " ".join(parts)


class Round(_Strict):
    """One wave of streams and the faults that meet it."""

    faults: Annotated[list[Fault], Field(min_length=1)]
    name: str = ""
    # None: the plan's. 0: no streams and no new requests, only the faults.
    streams: Annotated[int, Field(ge=0)] | None = None

    @property
    def title(self) -> str:
        return self.name or ", then ".join(map(str, self.faults))


class HostsShape(_Strict):
    """A cluster over hosts of its own, network namespaces of this machine: one daemon a host."""

    etcd: Literal[1, 3, 5] = 3
    controlplanes: Annotated[int, Field(ge=1, le=9)] = 2
    workers: Annotated[int, Field(ge=1, le=32)] = 2


class Plan(_Strict):
    """Rounds, one after another, each on a cluster that is whole again."""

    rounds: Annotated[list[Round], Field(min_length=1)]
    # None: a cluster that runs already.
    hosts: HostsShape | None = None
    streams: Annotated[int, Field(ge=1)] = 16
    tokens: Annotated[int, Field(ge=2)] = 200
    # Seconds between new short requests all along; 0: none.
    new_request_every: Annotated[float, Field(ge=0)] = 0.5
    # Seconds that the cluster may take to be whole again after a round.
    heal: Annotated[float, Field(gt=0)] = 180.0

    @model_validator(mode="after")
    def _check(self) -> Plan:
        lacking = [fault for part in self.rounds for fault in part.faults if fault.needs_hosts and self.hosts is None]
        if lacking:
            raise ValueError(f"'{lacking[0]}' needs hosts: give the plan a section `hosts`")
        return self

    def only(self, texts: Sequence[str]) -> Plan:
        """The same plan with the rounds alone whose title contains one of `texts`. Raises PlanError if there are none
        for one of them."""
        for text in texts:
            if not any(text in part.title for part in self.rounds):
                titles = "; ".join(part.title for part in self.rounds)
                raise PlanError(f"no round of the plan is called {text!r}: {titles}")
        rounds = [part for part in self.rounds if any(text in part.title for text in texts)]
        return self.model_copy(update={"rounds": rounds})


def read_plan(path: Path) -> Plan:
    """Raises PlanError naming the place in the file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise PlanError(f"{path} is no YAML: {error}") from error
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise PlanError(f"{path}: {place}: {problem['msg'].removeprefix('Value error, ')}") from error
