"""Deliberate bugs: each changes one decision of a core, and names the world in which it should show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import controlplane.core.adoption
import controlplane.core.deployments
import controlplane.core.groups
import controlplane.core.load
import controlplane.core.membership
import controlplane.core.scheduler
import controlplane.core.sessions
import controlplane.core.step
import controlplane.gateway.request_rules
import controlplane.gateway.route_rules
import controlplane.gateway.serve_rules
import controlplane.gateway.step
import controlplane.runtime.probe
import controlplane.store
import dataplane.core.bodies
import dataplane.core.cursors
import dataplane.core.sync
from controlplane.core.messages import RevokeLease
from controlplane.gateway.state import GatewayState
from controlplane.runtime.etcd_types import Compare, Target
from controlplane.runtime.ids import Epoch, Slot
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.messages.route import Inventory, JournalPhase
from dataplane.engine.book import SequenceBook
from tools.sim.world import Shape

core = controlplane.core
gateway = controlplane.gateway
worker = dataplane.core

SMALL = Shape(control_planes=2, workers=2, devices=1, replicas=2)
PLAIN = Shape()


@dataclass(frozen=True, slots=True)
class Mutant:
    """`apply` makes the bug; `kinds` are the faults that should bring it out."""

    name: str
    apply: Callable[[pytest.MonkeyPatch], None]
    kinds: tuple[str, ...]
    shape: Shape = SMALL
    # Seeds that it takes to find it, counted from 0 on.
    seeds: int = 1


# ---------------------------------------------------------------- the leader


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


def unguarded_write(patch: pytest.MonkeyPatch) -> None:
    def anybody(key: str, value: bytes) -> Compare:
        return Compare(key, Target.VERSION, 1)

    patch.setattr(controlplane.store, "value_is", anybody)


# ---------------------------------------------------------------- the gateway


def double_delivery(patch: pytest.MonkeyPatch) -> None:
    """A worker that sends all again meets a journal that takes all."""

    def take(choice: Any, first_index: int, tokens: Any) -> Any:
        choice.tokens.extend(tokens)
        return tokens

    def rewind(choice: Any, next_index: int) -> None:
        choice.sent, choice.finish_sent = choice.delivered, False

    patch.setattr(gateway.serve_rules, "take_fresh", take)
    patch.setattr(worker.sync, "rewind", rewind)


def forget_on_failover(patch: pytest.MonkeyPatch) -> None:
    original = GatewayState.inventory

    def inventory(self: GatewayState, now: float) -> Any:
        for chunk in original(self, now):
            kept = tuple(one for one in chunk.journals if one.phase is not JournalPhase.ROUTING)
            yield Inventory(journals=kept, last=chunk.last)

    patch.setattr(GatewayState, "inventory", inventory)


def closed_epoch_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gateway.route_rules, "on_closed", lambda state, closed, now: [])


def bump_without_key(patch: pytest.MonkeyPatch) -> None:
    def placed(self: GatewayState, key: Any) -> list[Any]:
        return [journal for journal in self.journals.values() if journal.placement]

    patch.setattr(GatewayState, "placed_at", placed)


def retry_without_budget(patch: pytest.MonkeyPatch) -> None:
    original = gateway.request_rules.move_on

    def move_on(state: Any, journal: Any, *rest: Any, **options: Any) -> Any:
        journal.retries = 0
        return original(state, journal, *rest, **options)

    for module in (gateway.route_rules, gateway.serve_rules, gateway.step):
        patch.setattr(module, "move_on", move_on)


def poison_retried(patch: pytest.MonkeyPatch) -> None:
    for module in (gateway.request_rules, gateway.route_rules, core.scheduler):
        patch.setattr(module, "CRASHES_MAX", 99)


def slot_reused(patch: pytest.MonkeyPatch) -> None:
    def mint(self: GatewayState) -> Slot:
        return next(Slot(number) for number in range(1, 1 << 20) if number not in self.slots)

    patch.setattr(GatewayState, "mint_slot", mint)


def shadows_never_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(worker.bodies, "drop", lambda turn, request: None)


# ---------------------------------------------------------------- the worker and its engine


def finish_without_its_token(patch: pytest.MonkeyPatch) -> None:
    original = worker.cursors._Message.add

    def add(self: Any, slot: Any, choice: Any) -> None:
        if choice.finish is not None and len(choice.tokens) - choice.sent > 0:
            choice.sent = len(choice.tokens)
        original(self, slot, choice)

    patch.setattr(worker.cursors._Message, "add", add)


def sync_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(worker.sync, "_find", lambda turn, stream, cursor: None)


def block_leak(patch: pytest.MonkeyPatch) -> None:
    def leak(self: SequenceBook, sequence: Any) -> None:
        sequence.blocks = []

    patch.setattr(SequenceBook, "_drop_blocks", leak)


MUTANTS = (
    Mutant("skip grace", skip_grace, ("stop", "lose_machine", "isolate"), seeds=5),
    Mutant("revoke on silence", revoke_on_silence, ("stop", "break"), PLAIN),
    Mutant("proof from one refusal", one_refusal_is_proof, ("reject_break",), PLAIN),
    Mutant("lease loss closes a live node", lease_loss_kills, ("revoke_lease",), PLAIN),
    Mutant("judging right after a pause", judge_after_pause, ("stop",), Shape(1, 2, 1, 2)),
    Mutant("a frozen leader revokes", frozen_leader_revokes, ("etcd_down", "kill"), seeds=4),
    Mutant("epoch reuse", epoch_reuse, ("rank_crash", "kill")),
    Mutant(
        "epoch from a restored store",
        epoch_of_a_restored_store,
        ("etcd_snapshot", "rank_crash", "etcd_restore", "kill"),
        seeds=2,
    ),
    Mutant("form before the epoch is written", form_before_written, ()),
    Mutant("credit leak", credit_leak, ()),
    Mutant("an end is forgotten", end_forgotten, ()),
    Mutant("guard by something else than the value", unguarded_write, ("kill",)),
    Mutant("double delivery", double_delivery, ("break",)),
    Mutant("forget on failover", forget_on_failover, ("kill", "break", "burst")),
    Mutant("news of a closed epoch ignored", closed_epoch_ignored, ("rank_crash",)),
    Mutant("bump without key", bump_without_key, ("rank_crash",)),
    Mutant("retry without budget", retry_without_budget, ("rank_crash", "burst"), seeds=9),
    Mutant("retry of a poison request", poison_retried, ("poison",)),
    Mutant("slot reused", slot_reused, ()),
    Mutant("shadows never ended", shadows_never_ended, ()),
    Mutant("finish apart from its token", finish_without_its_token, ()),
    Mutant("sync ignored", sync_ignored, ("break",)),
    Mutant("block leak", block_leak, ()),
)
