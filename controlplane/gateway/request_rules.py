"""What every rule ends in: ask, place, move on, fail, end. Pure."""
# pyright: strict

from __future__ import annotations

from controlplane.gateway import leaderless
from controlplane.gateway.journal import ChoiceJournal, Journal, Placement
from controlplane.gateway.messages import (
    AskRoute,
    ConnectWorker,
    Counted,
    Effect,
    Failed,
    Failure,
    Moved,
    SendWorker,
    TellEnd,
    WorkerKey,
)
from controlplane.gateway.state import GatewayState, Worker, WorkerPhase
from controlplane.runtime.ids import Attempt, NodeId, Slot
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.route import EndEntry, JournalPhase, Outcome, ReplicaEpoch, RouteCause, Routed
from controlplane.runtime.messages.serve import CancelSlots, EndRequests, FinishReason

EXCLUDES_MAX = 8
CRASHES_MAX = 2
"""A request that was in the step that killed its engine this often is not tried again."""

_JITTER_DIGITS = 8


def ask(state: GatewayState, journal: Journal, now: float) -> list[Effect]:
    """Ask the leader where the attempt may run. Without one its successor's inventory will ask, unless that takes so
    long that the last replica table must do."""
    journal.ask_at = None
    if state.leader_up:
        return [AskRoute(journal.entry(now))]
    if leaderless.may_route(state, now) and (routed := leaderless.route(state, journal)) is not None:
        return [Counted("routed_leaderless"), *place(state, journal, routed, now)]
    starve(state, journal, now)
    if state.leaderless_from is not None:
        journal.ask_at = state.wake_at(max(state.leaderless_from, now + state.timings.heartbeat_interval), journal)
    return []


def ask_later(state: GatewayState, journal: Journal, now: float, delay: float) -> None:
    """Ask after `delay` seconds, spread by up to a fifth so that many do not ask at once."""
    share = int(journal.request[:_JITTER_DIGITS], 16) / 16**_JITTER_DIGITS
    journal.ask_at = state.wake_at(now + delay * (0.8 + 0.4 * share), journal)


def starve(state: GatewayState, journal: Journal, now: float) -> None:
    """Nothing can serve the journal at present: count its patience from the first time."""
    if journal.starved_since is None:
        journal.starved_since = now
        state.wake_at(now + state.timings.leader_grace, journal)


def place(state: GatewayState, journal: Journal, routed: Routed, now: float) -> list[Effect]:
    """Take the permit: slots for the open choices, and the body as soon as the worker's stream is up."""
    permit = routed.permit
    key = WorkerKey(routed.serve_address)
    journal.placement = Placement(
        key=ReplicaEpoch(replica=permit.replica, epoch=permit.epoch), worker=key, node=routed.node, permit=permit
    )
    journal.phase = JournalPhase.OPENING
    journal.opened = False
    journal.starved_since = journal.ask_at = journal.moved_at = None
    for choice in journal.choices:
        if choice.finished is None:
            choice.slot = state.mint_slot()
            choice.gap = False
            state.slots[choice.slot] = (journal, choice)
    effects = want_worker(state, key, routed.node)
    if state.workers[key].phase == WorkerPhase.UP:
        return effects + send_body(state, journal, now)
    journal.open_by = state.wake_at(now + state.timings.session_silence, journal)
    return effects


def want_worker(state: GatewayState, key: WorkerKey, node: NodeId) -> list[Effect]:
    """Know the worker and have a stream to it."""
    if key in state.workers:
        return []
    state.workers[key] = Worker(key=key, node=node)
    return [ConnectWorker(key, node)]


def send_body(state: GatewayState, journal: Journal, now: float) -> list[Effect]:
    place = journal.placement
    assert place is not None
    journal.opened = True
    journal.visited[place.worker] = None
    journal.open_by = state.wake_at(now + state.timings.stage, journal)
    return [SendWorker(place.worker, journal.body(place.permit, now))]


def leave(state: GatewayState, journal: Journal, reason: Reason) -> list[Effect]:
    """Give up the current placement: its slots mean nothing from now on."""
    slots = journal.live_slots()
    for choice in journal.choices:
        release_slot(state, choice)
    place, journal.placement = journal.placement, None
    journal.open_by = None
    if place is None:
        return []
    journal.past.add(place.key)
    if not slots or not journal.opened:
        return []
    return cancel_slots(state, place.worker, slots, reason)


def release_slot(state: GatewayState, choice: ChoiceJournal) -> None:
    if choice.slot is not None:
        del state.slots[choice.slot]
        choice.slot = None


def cancel_slots(state: GatewayState, key: WorkerKey, slots: tuple[Slot, ...], reason: Reason) -> list[Effect]:
    """Free the sequences. Without a stream the next Sync does it, for it does not name them."""
    worker = state.workers.get(key)
    if worker is None or worker.phase != WorkerPhase.UP:
        return []
    return [SendWorker(key, CancelSlots(slots=slots, reason=reason))]


def move_on(
    state: GatewayState,
    journal: Journal,
    cause: RouteCause,
    reason: Reason,
    now: float,
    *,
    crashed: bool = False,
    exclude: bool = True,
    delay: float = 0.0,
) -> list[Effect]:
    """The attempt is over: ask for the next one, or fail honestly. A planned move costs no retry, nor does an attempt
    whose body never left: it may be this gateway that is cut off."""
    place = journal.placement
    assert place is not None
    assert not journal.finished
    begun = journal.opened
    effects = leave(state, journal, reason)
    if crashed:
        journal.crashes.add(place.key)
    planned = cause == RouteCause.PLANNED
    journal.retries += begun and not planned
    if not planned and journal.stuck_since is None:
        journal.stuck_since = now if journal.moved_at is None else journal.moved_at
    if len(journal.crashes) >= CRASHES_MAX:
        text = f"the request ended {len(journal.crashes)} engines that ran it: {reason.text}"
        return effects + fail(state, journal, Failure.POISON, Reason(kind=ReasonKind.POISON, text=text), now)
    if begun and journal.retries > state.max_retries[journal.asked.deployment]:
        text = f"lost {journal.retries} times, last: {reason.text or reason.kind.name.lower()}"
        spent = Reason(kind=ReasonKind.RETRIES_EXHAUSTED, text=text)
        return effects + fail(state, journal, Failure.RETRIES, spent, now)
    journal.attempt = Attempt(journal.attempt + 1)
    journal.attempt_tokens = 0
    journal.phase = JournalPhase.ROUTING
    journal.cause = cause
    if exclude:
        journal.exclude = (*journal.exclude, place.key)[-EXCLUDES_MAX:]
    effects.append(Moved(journal.request, journal.attempt, planned, reason))
    if delay > 0:
        ask_later(state, journal, now, delay)
        return effects
    return effects + ask(state, journal, now)


def fail(
    state: GatewayState, journal: Journal, failure: Failure, reason: Reason, now: float, retry_ms: int = 0
) -> list[Effect]:
    """End the request with an error."""
    outcome = Outcome.CANCELLED if failure == Failure.CANCELLED else Outcome.FAILED
    effects = leave(state, journal, reason)
    effects += close(state, journal, outcome)
    effects.append(Failed(journal.request, failure, reason, retry_ms))
    return effects


def close(state: GatewayState, journal: Journal, outcome: Outcome) -> list[Effect]:
    """Forget the journal; its shadows may go."""
    effects: list[Effect] = []
    del state.journals[journal.request]
    state.journal_tokens -= journal.prompt_tokens + journal.delivered_tokens
    for key in journal.visited:
        worker = state.workers.get(key)
        if worker is None:
            continue
        if worker.phase == WorkerPhase.UP:
            effects.append(SendWorker(key, EndRequests(requests=(journal.request,))))
        else:
            worker.owed_ends.append(journal.request)
    if state.leader_up:
        tokens = journal.delivered_tokens
        effects.append(
            TellEnd(EndEntry(request=journal.request, attempt=journal.attempt, outcome=outcome, tokens=tokens))
        )
    return effects


def finish_choice(state: GatewayState, journal: Journal, choice: ChoiceJournal, reason: FinishReason) -> None:
    """The choice has all its tokens; with the last choice the request only waits for its client."""
    choice.finished = reason
    release_slot(state, choice)
    if journal.finished:
        journal.phase = JournalPhase.DRAINING_CLIENT
        journal.open_by = None
