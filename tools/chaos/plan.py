"""The plan file: clusters, and for each one rounds of faults. Several plans stand in one file as documents of YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from controlplane.config import ClusterConfig
from tools.chaos.fault import Fault, Strict


class PlanError(Exception):
    """The plan cannot be used; the text names the file and what is wrong."""


class Round(Strict):
    """One wave of streams and the faults that meet it."""

    faults: Annotated[list[Fault], Field(min_length=1)]
    name: str = ""
    # None: the plan's. 0: no streams and no new requests, only the faults.
    streams: Annotated[int, Field(ge=0)] | None = None

    @property
    def title(self) -> str:
        return self.name or ", then ".join(map(str, self.faults))


class HostsShape(Strict):
    """A cluster over hosts of its own, network namespaces of this machine: one daemon a host."""

    etcd: Literal[1, 3, 5] = 3
    controlplanes: Annotated[int, Field(ge=1, le=9)] = 2
    workers: Annotated[int, Field(ge=1, le=32)] = 2
    # Of each worker.
    devices: Annotated[int, Field(ge=1, le=16)] = 1
    # Sections of the cluster's configuration, as in its file: parallelism, fault_tolerance, model.
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> HostsShape:
        if "cluster" in self.settings:
            raise ValueError("the section cluster follows from the hosts")
        try:
            ClusterConfig.model_validate(self.settings)
        except ValidationError as error:
            raise ValueError(f"settings.{_first_problem(error)}") from error
        return self


class Plan(Strict):
    """One cluster, and rounds, one after another, each on that cluster whole again."""

    # Of the cluster, for people.
    name: str = ""
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

    def only(self, texts: Sequence[str]) -> Plan | None:
        """The same plan with the rounds alone whose title contains one of `texts`; None if there are none."""
        rounds = [part for part in self.rounds if any(text in part.title for text in texts)]
        return self.model_copy(update={"rounds": rounds}) if rounds else None


def pick(plans: Sequence[Plan], texts: Sequence[str]) -> list[Plan]:
    """The plans with the rounds alone whose title contains one of `texts`. Raises PlanError if one is in no title."""
    titles = [part.title for plan in plans for part in plan.rounds]
    for text in texts:
        if not any(text in title for title in titles):
            raise PlanError(f"no round of the plan is called {text!r}: {'; '.join(titles)}")
    return [some for plan in plans if (some := plan.only(texts)) is not None]


def read_plans(path: Path) -> list[Plan]:
    """Raises PlanError naming the place in the file."""
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8"))) or [None]
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise PlanError(f"{path} is no YAML: {error}") from error
    if len(documents) == 1:
        return [_validate(documents[0], str(path))]
    plans = [_validate(document, f"{path}, plan {number}") for number, document in enumerate(documents, 1)]
    if len(plans) != sum(plan.hosts is not None for plan in plans):
        raise PlanError(f"{path}: each of several plans needs a cluster of its own: a section `hosts`")
    return plans


def _validate(document: object, where: str) -> Plan:
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        raise PlanError(f"{where}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the file"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"
