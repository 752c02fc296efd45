"""The plan file: which faults, when, to whom."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class PlanError(Exception):
    """The plan cannot be used; the text names the file and what is wrong."""


class Action(Enum):
    """What is done to a process; `drain` asks the leader instead."""

    KILL = "kill"
    STOP = "stop"
    TERMINATE = "terminate"
    DRAIN = "drain"


KINDS = ("rank", "worker", "controlplane", "leader", "etcd")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(_Strict):
    """A process by what it is: `rank main-0`, `rank main-0/1`, `worker worker-0`, `controlplane cp-0`, `leader`,
    `etcd`."""

    kind: str
    name: str = ""
    rank: int = 0

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError("a target is text, such as 'rank main-0' or 'leader'")
        kind, _, name = value.partition(" ")
        if kind not in KINDS:
            raise ValueError(f"unknown target {value!r}: one of {', '.join(KINDS)}")
        if (kind in ("leader", "etcd")) == bool(name):
            raise ValueError(f"{kind!r} takes {'no' if name else 'a'} name: {value!r}")
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
    action: Action
    target: Target
    # Of a stop: until it goes on. 0: for good.
    seconds: Annotated[float, Field(ge=0)] = 0.0

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
        if self.seconds and self.action is not Action.STOP:
            raise ValueError("only a stop takes seconds")
        if self.action is Action.DRAIN and self.target.kind != "worker":
            raise ValueError("only a worker can be drained")
        return self

    def __str__(self) -> str:
        lasting = f" for {self.seconds:g} s" if self.seconds else ""
        return f"{self.action.value} {self.target}{lasting}"


class Round(_Strict):
    """One wave of streams and the faults that meet it."""

    faults: Annotated[list[Fault], Field(min_length=1)]
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or ", then ".join(map(str, self.faults))


class Plan(_Strict):
    """Rounds, one after another, each on a cluster that is whole again."""

    rounds: Annotated[list[Round], Field(min_length=1)]
    streams: Annotated[int, Field(ge=1)] = 16
    tokens: Annotated[int, Field(ge=2)] = 200
    # Seconds between new short requests all along; 0: none.
    new_request_every: Annotated[float, Field(ge=0)] = 0.5
    # Seconds that the cluster may take to be whole again after a round.
    heal: Annotated[float, Field(gt=0)] = 180.0


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
