"""What the leader says, and the loss of a leader. Pure."""
# pyright: strict

from __future__ import annotations

from controlplane.gateway.messages import Counted, Effect, Failure, WorkerKey
from controlplane.gateway.request_rules import CRASHES_MAX, ask, ask_later, fail, move_on, place, starve, want_worker
from controlplane.gateway.state import GatewayState
from controlplane.runtime.ids import Attempt, Term
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import (
    CancelRequest,
    JournalPhase,
    LeaderHeartbeat,
    MoveRequests,
    ReplicaClosed,
    ReplicaEpoch,
    ReplicaRow,
    ReplicaTable,
    RouteCause,
    RouteCode,
    Routed,
    RoutedBatch,
    RouteDown,
    RouteRefused,
)

_FINAL = {
    RouteCode.UNKNOWN_DEPLOYMENT: Failure.UNKNOWN_MODEL,
    RouteCode.TOO_LONG: Failure.TOO_LONG,
    RouteCode.DEADLINE: Failure.DEADLINE,
    RouteCode.POISON: Failure.POISON,
    RouteCode.DEPLOYMENT_FAILED: Failure.UNAVAILABLE,
}

PLANNED_KINDS = frozenset({ReasonKind.DRAINING, ReasonKind.REPLACED, ReasonKind.ADMIN})
"""Reasons of a change that was asked for: it costs a request no retry."""


def on_leader_opened(state: GatewayState, term: Term) -> list[Effect]:
    """The inventory asks for every journal in ROUTING; nothing has starved yet under this leader."""
    state.leader_up = True
    _unsay(state)
    state.term = max(state.term, term)
    for journal in state.journals.values():
        journal.starved_since = journal.ask_at = None
    return []


def _unsay(state: GatewayState) -> None:
    """What the leader before said of itself counts no more."""
    state.frozen, state.complete_at = False, None


def on_leader_lost(state: GatewayState, now: float) -> list[Effect]:
    state.leader_up = False
    _unsay(state)
    # A successor of one that is provably dead is elected sooner.
    state.leaderless_from = now + state.timings.heartbeat_interval
    effects: list[Effect] = []
    for journal in state.journals.values():
        if journal.phase == JournalPhase.ROUTING:
            effects += ask(state, journal, now)
    return effects


def on_leader_said(state: GatewayState, body: RouteDown, now: float) -> list[Effect]:
    match body:
        case RoutedBatch():
            effects: list[Effect] = []
            for routed in body.routed:
                effects += on_routed(state, routed, now)
            for refused in body.refused:
                effects += on_refused(state, refused, now)
            return effects
        case ReplicaTable():
            return on_table(state, body, now)
        case ReplicaClosed():
            return on_closed(state, body, now)
        case MoveRequests():
            return on_move(state, body, now)
        case LeaderHeartbeat():
            state.frozen = body.frozen
            state.complete_at = None if body.frozen or body.workers_unheard else now
            return []
        case CancelRequest():
            journal = state.journals.get(body.request)
            if journal is None or journal.finished:
                return []
            return fail(state, journal, Failure.CANCELLED, body.reason, now)
        case _:
            # Welcome and refusals are the link's own affair.
            return []


def on_routed(state: GatewayState, routed: Routed, now: float) -> list[Effect]:
    journal = state.journals.get(routed.permit.request)
    if journal is None or journal.phase != JournalPhase.ROUTING or routed.permit.attempt != journal.attempt:
        return [Counted("routed_stale")]
    state.term = max(state.term, routed.permit.term)
    return place(state, journal, routed, now)


def on_refused(state: GatewayState, refused: RouteRefused, now: float) -> list[Effect]:
    """A new request is refused when the queue is full, and waits a grace for a replica; a replay always waits."""
    journal = state.journals.get(refused.request)
    if journal is None or journal.phase != JournalPhase.ROUTING or refused.attempt != journal.attempt:
        return [Counted("refused_stale")]
    if refused.code == RouteCode.STALE_ATTEMPT:
        journal.attempt = Attempt(refused.newest_attempt + 1)
        return [Counted("attempts_raised"), *ask(state, journal, now)]
    if refused.code in _FINAL:
        return fail(state, journal, _FINAL[refused.code], refused.reason, now)
    if refused.code == RouteCode.OVERLOADED and not journal.admitted:
        return fail(state, journal, Failure.OVERLOADED, refused.reason, now, refused.retry_ms)
    if refused.code == RouteCode.NO_REPLICA:
        starve(state, journal, now)
    # Whoever was excluded may be all there is.
    journal.exclude = ()
    delay = max(refused.retry_ms / 1000, state.timings.reconnect_min)
    ask_later(state, journal, now, delay)
    return []


def on_table(state: GatewayState, table: ReplicaTable, now: float) -> list[Effect]:
    """Take the rows; a higher epoch than a journal's proves its own closed, should the news have been lost."""
    effects: list[Effect] = []
    if table.full:
        state.rows.clear()
        state.told.clear()
    for row in table.rows:
        effects += on_row(state, row, now)
    for worker in table.workers:
        key = WorkerKey(worker.serve_address)
        if worker.gone:
            state.told.pop(key, None)
        else:
            state.told[key] = worker.node
    return effects


def on_row(state: GatewayState, row: ReplicaRow, now: float) -> list[Effect]:
    effects: list[Effect] = []
    reason = Reason(kind=ReasonKind.STALE_EPOCH, text=f"replica {row.replica} is at epoch {row.epoch}")
    for journal in list(state.journals.values()):
        at = journal.placement
        if at is not None and not journal.finished and at.key.replica == row.replica and at.key.epoch < row.epoch:
            effects += move_on(state, journal, RouteCause.LOST, reason, now)
    if row.phase == ReplicaPhase.CLOSED:
        state.rows.pop(row.replica, None)
        return effects
    state.rows[row.replica] = row
    state.max_retries[row.deployment] = row.max_retries
    if row.phase == ReplicaPhase.READY and row.serve_address:
        effects += want_worker(state, WorkerKey(row.serve_address), row.node)
        for journal in state.journals.values():
            if journal.ask_at is not None and journal.starved_since is not None:
                effects += ask(state, journal, now)
    return effects


def on_closed(state: GatewayState, closed: ReplicaClosed, now: float) -> list[Effect]:
    """Keyed by (replica, epoch): whoever already left it finds nothing to do, but a crash is still counted."""
    key = ReplicaEpoch(replica=closed.replica, epoch=closed.epoch)
    suspects = frozenset(closed.suspects)
    cause = RouteCause.PLANNED if closed.reason.kind in PLANNED_KINDS else RouteCause.LOST
    effects: list[Effect] = []
    row = state.rows.get(closed.replica)
    if row is not None and row.epoch <= closed.epoch:
        del state.rows[closed.replica]
    for journal in state.placed_at(key):
        if not journal.finished:
            effects += move_on(state, journal, cause, closed.reason, now, crashed=journal.request in suspects)
    for request in closed.suspects:
        journal = state.journals.get(request)
        if journal is None or key not in journal.past or journal.finished:
            continue
        journal.crashes.add(key)
        if len(journal.crashes) >= CRASHES_MAX:
            poison = Reason(kind=ReasonKind.POISON, text=f"the request ended {CRASHES_MAX} engines that ran it")
            effects += fail(state, journal, Failure.POISON, poison, now)
    return effects


def on_move(state: GatewayState, move: MoveRequests, now: float) -> list[Effect]:
    key = ReplicaEpoch(replica=move.replica, epoch=move.epoch)
    named = frozenset(move.requests)
    effects: list[Effect] = []
    for journal in state.placed_at(key):
        if not journal.finished and (not named or journal.request in named):
            effects += move_on(state, journal, RouteCause.PLANNED, move.reason, now)
    return effects
