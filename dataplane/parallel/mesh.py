"""The mesh: one object owns all parallel degrees of a replica and the groups along its axes."""

from __future__ import annotations

from controlplane.runtime.messages.common import ParallelDegrees
from dataplane.parallel.groups import Group


class Mesh:
    """This rank's place and its groups. Ranks count with the tensor axis fastest, then pipeline, then data."""

    def __init__(self, degrees: ParallelDegrees, rank: int) -> None:
        self.degrees = degrees
        self.rank = rank
        self.tensor = Group("tensor", (rank,), rank)

    @classmethod
    def single(cls) -> Mesh:
        """A mesh of one rank."""
        return cls(ParallelDegrees(), 0)

    @property
    def stage(self) -> int:
        return self.rank // self.degrees.tensor % self.degrees.pipeline

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.degrees.pipeline - 1
