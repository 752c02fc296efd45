"""Degrees of parallelism: how many ranks they take, and which smaller ones a model can be served with."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from controlplane.runtime.messages.common import ParallelDegrees


def ranks_of(degrees: ParallelDegrees) -> int:
    """Ranks of one replica."""
    return degrees.tensor * degrees.pipeline


def smaller(full: ParallelDegrees, above: int = 0) -> tuple[ParallelDegrees, ...]:
    """Degrees with fewer ranks than `full`, but more than `above`: most ranks first, then the largest tensor groups.

    A tensor degree divides the full one, as what it cuts (heads, features) was made to be cut so; an expert degree
    divides both. Layers can be dealt to any number of stages.
    """
    found = [
        _cut(full, tensor, pipeline)
        for tensor in range(1, full.tensor + 1)
        if full.tensor % tensor == 0
        for pipeline in range(1, full.pipeline + 1)
        if above < tensor * pipeline < ranks_of(full)
    ]
    return tuple(sorted(found, key=lambda degrees: (-ranks_of(degrees), -degrees.tensor)))


def is_smaller(degrees: ParallelDegrees, full: ParallelDegrees) -> bool:
    """`degrees` are among `smaller(full)`."""
    fewer = ranks_of(degrees) < ranks_of(full) and degrees.pipeline <= full.pipeline
    return fewer and full.tensor % degrees.tensor == 0 and degrees == _cut(full, degrees.tensor, degrees.pipeline)


def _cut(full: ParallelDegrees, tensor: int, pipeline: int) -> ParallelDegrees:
    return replace(full, tensor=tensor, pipeline=pipeline, expert=gcd(full.expert, tensor))


def named(degrees: ParallelDegrees) -> str:
    """For people: "tp2×pp2"."""
    axes = (("tp", degrees.tensor), ("pp", degrees.pipeline), ("ep", degrees.expert))
    return "×".join(f"{axis}{degree}" for axis, degree in axes if degree > 1) or "tp1"
