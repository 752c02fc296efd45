"""Deliberate bugs of gateways, worker daemons and engines: each changes one decision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import controlplane.core.scheduler
import controlplane.gateway.request_rules
import controlplane.gateway.route_rules
import controlplane.gateway.serve_rules
import controlplane.gateway.step
import controlplane.runtime.leader
import dataplane.core.admission
import dataplane.core.bodies
import dataplane.core.cursors
import dataplane.core.gateways
import dataplane.core.leader
import dataplane.core.shadows
import dataplane.core.starvation
import dataplane.core.step
import dataplane.core.sync
from controlplane.gateway.state import GatewayState
from controlplane.runtime.ids import Slot
from controlplane.runtime.messages.route import Inventory, JournalPhase
from dataplane.engine.book import SequenceBook

core = controlplane.core
gateway = controlplane.gateway
worker = dataplane.core

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


def old_attempt_counts(patch: pytest.MonkeyPatch) -> None:
    """Skip fencing: what a slot of an attempt that was given up brings still counts for its journal."""
    leave, owner = gateway.request_rules.leave, gateway.serve_rules._owner
    given_up: dict[tuple[int, int], Any] = {}

    def left(state: GatewayState, journal: Any, *rest: Any) -> Any:
        held = {choice.slot: choice for choice in journal.choices if choice.slot is not None}
        given_up.update({(id(state), slot): (journal, choice) for slot, choice in held.items()})
        return leave(state, journal, *rest)

    def owner_of(state: GatewayState, key: Any, slot: int) -> Any:
        old = given_up.get((id(state), slot))
        return old if old is not None and state.journals.get(old[0].request) is old[0] else owner(state, key, slot)

    patch.setattr(gateway.request_rules, "leave", left)
    patch.setattr(gateway.serve_rules, "_owner", owner_of)


def leader_without_doubt(patch: pytest.MonkeyPatch) -> None:
    """What a new leader's table does not name is not there."""
    original = gateway.route_rules.on_leader_said

    def said(state: GatewayState, body: Any, now: float) -> Any:
        effects = original(state, body, now)
        state.complete_at = now
        return effects

    patch.setattr(gateway.step, "on_leader_said", said)


def shadows_never_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(worker.bodies, "drop", lambda turn, request: None)


# ---------------------------------------------------------------- the worker and its engine


def old_leader_obeyed(patch: pytest.MonkeyPatch) -> None:
    """Skip fencing: no term is remembered, so that a frame of any is as good as another."""
    for module in (worker.bodies, worker.gateways, worker.step):
        patch.setattr(module, "see_term", lambda turn, term, address="": None)
    patch.setattr(worker.leader, "raise_term", lambda turn, term: None)


def old_term_runs(patch: pytest.MonkeyPatch) -> None:
    """Skip fencing: a permit of a leader that was followed runs."""
    patch.setattr(worker.admission, "_judge_term", lambda state, permit: None)


def old_epoch_runs(patch: pytest.MonkeyPatch) -> None:
    """Skip fencing: a permit of an epoch that is over runs in the next."""
    original = worker.admission._judge_place

    def judge(state: Any, permit: Any) -> Any:
        held = state.replicas.get(permit.replica)
        return original(state, permit if held is None else replace(permit, epoch=held.epoch))

    patch.setattr(worker.admission, "_judge_place", judge)


def two_leaders_of_a_term(patch: pytest.MonkeyPatch) -> None:
    """Skip fencing: whoever says that it leads in the term does, even if another did."""
    original = worker.leader._welcomed

    def welcomed(turn: Any, *rest: Any) -> None:
        turn.state.welcomed = None
        original(turn, *rest)

    patch.setattr(worker.leader, "_welcomed", welcomed)
    patch.setattr(controlplane.runtime.leader.LeaderWatch, "meet", lambda self, term, incarnation: None)


def orphans_dropped(patch: pytest.MonkeyPatch) -> None:
    """A stream whose gateway dies is not kept for another."""
    original = worker.shadows.orphan

    def orphan(turn: Any, request: Any) -> None:
        original(turn, request)
        request.expires = turn.now

    patch.setattr(worker.gateways, "orphan", orphan)


def finish_without_its_token(patch: pytest.MonkeyPatch) -> None:
    original = worker.cursors._Message.add

    def add(self: Any, slot: Any, choice: Any) -> None:
        if choice.finish is not None and len(choice.tokens) - choice.sent > 0:
            choice.sent = len(choice.tokens)
        original(self, slot, choice)

    patch.setattr(worker.cursors._Message, "add", add)


def sync_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(worker.sync, "_find", lambda turn, stream, cursor: None)


def pauses_are_hangs(patch: pytest.MonkeyPatch) -> None:
    """Time in which nobody could move counts like any other."""
    patch.setattr(worker.starvation, "count", lambda turn, event: None)


def block_leak(patch: pytest.MonkeyPatch) -> None:
    def leak(self: SequenceBook, sequence: Any) -> None:
        sequence.blocks = []

    patch.setattr(SequenceBook, "_drop_blocks", leak)
