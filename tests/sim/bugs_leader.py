"""Deliberate bugs of the leader: each changes one decision."""

from __future__ import annotations

from typing import Any

import pytest

import controlplane.core.adoption
import controlplane.core.deployments
import controlplane.core.elastic
import controlplane.core.groups
import controlplane.core.load
import controlplane.core.membership
import controlplane.core.recovery
import controlplane.core.scheduler
import controlplane.core.sessions
import controlplane.core.spares
import controlplane.core.state
import controlplane.core.step
import controlplane.election
import controlplane.runtime.probe
import controlplane.store
from controlplane.core.fair_queue import FairQueue
from controlplane.core.messages import RevokeLease, WritePlacement
from controlplane.core.places import Places
from controlplane.runtime.etcd_types import Compare, Target
from controlplane.runtime.ids import Epoch, ReplicaId, Term
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.records import PlacementRecord
from controlplane.store import Store

core = controlplane.core


def skip_grace(patch: pytest.MonkeyPatch) -> None:
    original = core.step._count_grace

    def count(state: Any, passed_s: float) -> None:
        state.grace_s = 0.0
        original(state, passed_s)

    patch.setattr(core.step, "_count_grace", count)


def revoke_on_silence(patch: pytest.MonkeyPatch) -> None:
    original = core.membership._unreachable

    def unreachable(state: Any, node: Any, reason: Any) -> None:
        original(state, node, reason)
        state.emit(RevokeLease(node.node, node.incarnation, node.lease_id))

    patch.setattr(core.membership, "_unreachable", unreachable)


def one_refusal_is_proof(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(controlplane.runtime.probe, "CONNECTS", 1)


def lease_loss_kills(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core.membership, "_speaks", lambda state, node: False)


def judge_after_pause(patch: pytest.MonkeyPatch) -> None:
    def tick(state: Any) -> None:
        interval = state.timings.heartbeat_interval
        passed_s = interval if state.ticked is None else state.now - state.ticked
        state.ticked = state.now
        core.step._count_grace(state, passed_s)
        core.membership.tick(state, passed_s)
        core.step.recovery.tick(state, passed_s)
        core.step.gateways.tick(state, passed_s)
        core.scheduler.expire(state)

    patch.setattr(core.step, "_tick", tick)


def frozen_leader_revokes(patch: pytest.MonkeyPatch) -> None:
    def act(state: Any, node: Any) -> None:
        if not node.revoked and node.link is None:
            node.revoked = True
            state.emit(RevokeLease(node.node, node.incarnation, node.lease_id))

    patch.setattr(core.membership, "_act_on_proof", act)


def epoch_reuse(patch: pytest.MonkeyPatch) -> None:
    original = core.groups.place

    def place(state: Any, replica: Any, *rest: Any) -> None:
        # Every second regroup takes the number of the one before.
        if replica.epoch > 1:
            state.epochs[replica.replica] = Epoch(replica.epoch - 1)
        original(state, replica, *rest)

    patch.setattr(core.deployments, "place", place)


def epoch_of_a_restored_store(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core.groups, "EPOCHS_A_TERM", 0)
    patch.setattr(core.state, "EPOCHS_A_TERM", 2)
    patch.setattr(core.adoption, "note_epoch", lambda state, replica, epoch: None)


def form_before_written(patch: pytest.MonkeyPatch) -> None:
    original = core.groups.place

    def place(state: Any, replica: Any, *rest: Any) -> None:
        original(state, replica, *rest)
        replica.stored = replica.epoch
        core.groups._enter(state, replica, ReplicaPhase.PREPARING)

    patch.setattr(core.deployments, "place", place)


def credit_leak(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core.load.Load, "ended", lambda self, request: self.outstanding.discard(request))


def end_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core.scheduler, "end", lambda state, ended: None)


def guard_by_create_revision(patch: pytest.MonkeyPatch) -> None:
    """A write counts if the leader key was created when the writer last saw it created."""
    original, seen = Store._write, {"revision": 0}

    def created(key: str, value: bytes) -> Compare:
        return Compare(key, Target.CREATE_REVISION, seen["revision"])

    async def write(self: Store, op: Any, *conditions: Compare) -> Any:
        key = self._guard._leader.key  # type: ignore[attr-defined]
        seen["revision"] = key.create_revision if key is not None else 0
        return await original(self, op, *conditions)

    patch.setattr(Store, "_write", write)
    patch.setattr(controlplane.store, "value_is", created)


def term_not_raised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(controlplane.election, "Term", lambda number: Term(max(1, number - 1)))


def stale_placement(patch: pytest.MonkeyPatch) -> None:
    """What is free is what was free when nothing was placed."""
    patch.setattr(Places, "taken", lambda self, node: set())


def queue_miscounted(patch: pytest.MonkeyPatch) -> None:
    original = FairQueue.discard

    def discard(self: FairQueue, request: Any) -> bool:
        before, left = self._new, original(self, request)
        self._new = before
        return left

    patch.setattr(FairQueue, "discard", discard)
    patch.setattr(FairQueue, "__iter__", lambda self: iter(list(self._tickets)))


def request_in_etcd(patch: pytest.MonkeyPatch) -> None:
    original = core.scheduler.admit

    def admit(state: Any, gateway: Any, entry: Any, *rest: Any) -> Any:
        record = PlacementRecord(
            replica=ReplicaId(entry.request), deployment=entry.deployment, epoch=Epoch(1), term=state.term
        )
        state.emit(WritePlacement(state.mint_write(), record))
        return original(state, gateway, entry, *rest)

    patch.setattr(core.scheduler, "admit", admit)


def shrunk_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core.deployments, "_outgrown", lambda state, deployment: [])


def parts_never_gathered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core.elastic, "_are_worth_one", lambda state, deployment, several: False)


def spare_free_twice(patch: pytest.MonkeyPatch) -> None:
    """A spare stays one when a replica takes its device."""
    original = core.spares.settle

    def settle(state: Any) -> None:
        before = {name: dict(node.spares) for name, node in state.nodes.items()}
        original(state)
        for name, node in state.nodes.items():
            node.spares = before[name] | node.spares

    patch.setattr(core.spares, "settle", settle)


def lost_is_dead(patch: pytest.MonkeyPatch) -> None:
    """A node whose lease ran out is taken for dead with all that it holds."""
    original = core.membership.lose

    def lose(state: Any, node: Any, reason: Any) -> None:
        before = state.unheard_s
        original(state, node, reason)
        state.unheard_s = before

    patch.setattr(core.membership, "lose", lose)


def spare_answers_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core.spares, "answered", lambda state, node, said: None)
