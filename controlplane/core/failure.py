"""A failure as a record: when it was noticed, and how far what followed has come."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

from controlplane.runtime.ids import Epoch, NodeId, ReplicaId, RequestId
from controlplane.runtime.messages.common import Reason

FAILURES_MAX = 256
"""Records kept; the oldest goes first."""


class FailurePhase(IntEnum):
    """What follows a failure. Values of FailurePhase in admin.proto."""

    # In memory: routing stopped, gateways were told.
    CLOSED = 1
    # The next epoch stands in etcd: whatever the old one still says is refused.
    FENCED = 2
    # The replica serves again.
    REGROUPED = 3
    # Every request that it held has another place, or ended.
    REPLAYED = 4
    # The first of them gave a token there.
    FIRST_TOKEN = 5


@dataclass(slots=True)
class Failure:
    """The end of a replica's epoch that nobody asked for. Times are monotonic seconds."""

    replica: ReplicaId
    epoch: Epoch
    noticed: float
    reason: Reason
    node: NodeId = NodeId("")
    phases: dict[FailurePhase, float] = field(default_factory=dict[FailurePhase, float])
    suspects: tuple[RequestId, ...] = ()
    # Epoch under which it serves again; 0: none yet.
    next_epoch: Epoch = Epoch(0)
    # Requests that it held, ever.
    lost: set[RequestId] = field(default_factory=set[RequestId])
    # Those without another place, and those without a token from there.
    homeless: set[RequestId] = field(default_factory=set[RequestId])
    silent: set[RequestId] = field(default_factory=set[RequestId])
    # Longest time between two tokens of one of its requests, as their gateways measured it.
    gap_ms_max: int = 0
    told: bool = False

    @property
    def over(self) -> bool:
        """Everything that was to follow has come."""
        return {FailurePhase.CLOSED, FailurePhase.REGROUPED} <= self.phases.keys() and not (self.homeless | self.silent)


@dataclass(slots=True)
class FailureLog:
    """The newest failures of this term, and which of them each request waits for."""

    records: deque[Failure] = field(default_factory=lambda: deque[Failure]())
    waiting: dict[RequestId, Failure] = field(default_factory=dict[RequestId, Failure])

    def of(self, replica: ReplicaId, epoch: Epoch) -> Failure | None:
        """The record of that epoch's end; the newest are looked at first."""
        return next((one for one in reversed(self.records) if (one.replica, one.epoch) == (replica, epoch)), None)

    def add(self, failure: Failure) -> Failure:
        self.records.append(failure)
        if len(self.records) > FAILURES_MAX:
            oldest = self.records.popleft()
            for request in oldest.homeless | oldest.silent:
                self.waiting.pop(request, None)
        return failure
