"""What a gateway knows of its requests, as far as a coordinator can tell."""

from __future__ import annotations

from controlplane.core.messages import (
    Effect,
    SendGateway,
)
from controlplane.runtime.ids import Attempt, Epoch, ReplicaId, RequestId
from controlplane.runtime.messages.route import (
    JournalInfo,
    JournalPhase,
    MoveRequests,
    ReplicaClosed,
    RouteCause,
    RoutedBatch,
)
from tests.scenario.coordinator.peers import entry


class Journals:
    """A gateway's side: current attempt of each request and where it runs."""

    def __init__(self) -> None:
        self.attempts: dict[RequestId, Attempt] = {}
        self.placed: dict[RequestId, tuple[ReplicaId, Epoch]] = {}
        self.asking: dict[RequestId, RouteCause] = {}

    def take(self, effect: Effect) -> None:
        if not isinstance(effect, SendGateway):
            return
        match effect.body:
            case RoutedBatch() as batch:
                for routed in batch.routed:
                    permit = routed.permit
                    if self.attempts.get(permit.request) == permit.attempt:
                        self.placed[permit.request] = (permit.replica, permit.epoch)
                        self.asking.pop(permit.request, None)
                for refused in batch.refused:
                    if refused.retry_ms and refused.request in self.attempts:
                        self.asking[refused.request] = RouteCause.NEW
            case ReplicaClosed() as closed:
                self._move((closed.replica, closed.epoch), RouteCause.LOST)
            case MoveRequests() as move:
                self._move((move.replica, move.epoch), RouteCause.PLANNED)
            case _:
                pass

    def _move(self, key: tuple[ReplicaId, Epoch], cause: RouteCause) -> None:
        for request in [request for request, at in self.placed.items() if at == key]:
            del self.placed[request]
            self.attempts[request] = Attempt(self.attempts[request] + 1)
            self.asking[request] = cause

    def inventory(self) -> tuple[JournalInfo, ...]:
        return tuple(
            JournalInfo(
                phase=JournalPhase.RUNNING if request in self.placed else JournalPhase.ROUTING,
                replica=self.placed.get(request, (ReplicaId(""), Epoch(0)))[0],
                epoch=self.placed.get(request, (ReplicaId(""), Epoch(0)))[1],
                entry=entry(request, attempt=attempt),
            )
            for request, attempt in self.attempts.items()
        )
