"""Ordering duties of the protocol (§4), checked on every effect by someone who sees only what goes in and out."""

from __future__ import annotations

from collections import defaultdict

from controlplane.core.messages import (
    ConnectionId,
    Effect,
    Event,
    GatewaySaid,
    Recorded,
    RevokeLease,
    SendGateway,
    SendWorker,
    StepDown,
    WorkerSaid,
    WriteDone,
    WritePlacement,
)
from controlplane.runtime.ids import Epoch, NodeId, ReplicaId, Term
from controlplane.runtime.messages.route import EndBatch, ReplicaClosed, RouteBatch, RoutedBatch
from controlplane.runtime.messages.session import (
    AssignBatch,
    FormGroup,
    GroupPhase,
    GroupState,
    PrepareGroup,
    WorkerSnapshot,
)

Key = tuple[ReplicaId, Epoch]


class Duties:
    """One leader's duties. `before` an event, `after` its effects."""

    def __init__(self, term: Term) -> None:
        self.term = term
        self.frozen = False
        self.over = False
        self.snapshotted: set[ConnectionId] = set()
        self.writing: dict[int, Key] = {}
        self.written: set[Key] = set()
        self.members: dict[Key, set[NodeId]] = {}
        self.prepared: dict[Key, set[ConnectionId]] = defaultdict(set)
        self.prepares: dict[Key, set[ConnectionId]] = defaultdict(set)
        self.routed: dict[tuple[ConnectionId, ReplicaId], Epoch] = {}
        self.closed: dict[ConnectionId, set[Key]] = defaultdict(set)

    def before(self, event: Event) -> None:
        match event:
            case WriteDone(write, True) if write in self.writing:
                self.written.add(self.writing[write])
            case WorkerSaid(connection, _, WorkerSnapshot(last=True)):
                self.snapshotted.add(connection)
            case WorkerSaid(connection, _, GroupState(phase=GroupPhase.PREPARED, ok=True) as answer):
                self.prepared[answer.replica, answer.epoch].add(connection)
            case _:
                pass

    def after(self, event: Event, effects: list[Effect], *, frozen: bool) -> None:
        """`frozen`: the leader was frozen before the event and is after it."""
        assert not (self.over and effects), "a leader that stepped down still acts"
        for effect in effects:
            self._one(effect)
            if frozen:
                assert not isinstance(effect, RevokeLease | WritePlacement), f"{effect} while frozen"
        if isinstance(event, GatewaySaid) and isinstance(event.body, RouteBatch | EndBatch):
            writes = [effect for effect in effects if isinstance(effect, WritePlacement)]
            ended = any(isinstance(effect, Recorded) and effect.name == "replica_closed" for effect in effects)
            assert not writes or ended, "a request was written to etcd"

    def _one(self, effect: Effect) -> None:
        match effect:
            case WritePlacement(write, record):
                assert record.term == self.term
                self.writing[write] = (record.replica, record.epoch)
            case SendWorker(connection, AssignBatch() as batch):
                assert connection in self.snapshotted, "Assign before the Snapshot's last chunk"
                assert all(permit.term == self.term for permit in batch.permits)
            case SendWorker(connection, PrepareGroup() as prepare):
                key = (prepare.replica, prepare.epoch)
                assert key in self.written, f"Prepare {key} before etcd held it"
                self.members[key] = {member.node for member in prepare.members}
                self.prepares[key].add(connection)
            case SendWorker(_, FormGroup() as form):
                key = (form.replica, form.epoch)
                assert len(self.prepared[key]) >= len(self.members[key]), f"Form {key} before all prepared"
            case SendGateway(connection, ReplicaClosed() as closed):
                self.closed[connection].add((closed.replica, closed.epoch))
            case SendGateway(connection, RoutedBatch() as batch):
                for routed in batch.routed:
                    self._routed(connection, (routed.permit.replica, routed.permit.epoch))
            case StepDown():
                self.over = True
            case _:
                pass

    def _routed(self, connection: ConnectionId, key: Key) -> None:
        assert key not in self.closed[connection], f"routed to {key} after it was closed"
        last = self.routed.get((connection, key[0]))
        if last is not None and last != key[1]:
            assert last < key[1], f"{key[0]} went back from epoch {last} to {key[1]}"
            assert (key[0], last) in self.closed[connection], f"routed to {key} before epoch {last} was closed"
        self.routed[connection, key[0]] = key[1]
