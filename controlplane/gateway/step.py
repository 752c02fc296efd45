"""The gateway's core: one event in, effects out. Pure."""
# pyright: strict

from __future__ import annotations

import heapq

from controlplane.gateway.journal import Journal, new_journal
from controlplane.gateway.messages import (
    ChoiceStopped,
    ClientDrained,
    ClientGone,
    DropWorker,
    Effect,
    Event,
    Failed,
    Failure,
    LeaderLost,
    LeaderOpened,
    LeaderSaid,
    RequestAccepted,
    ResumeAsked,
    ResumeDropped,
    StreamAdopted,
    Tick,
    WorkerBroken,
    WorkerGone,
    WorkerKey,
    WorkerSaid,
    WorkerUp,
)
from controlplane.gateway.request_rules import ask, cancel_slots, close, fail, finish_choice, leave, move_on
from controlplane.gateway.resume_rules import end_late, on_adopted, on_resume_asked, on_resume_dropped
from controlplane.gateway.route_rules import on_leader_lost, on_leader_opened, on_leader_said
from controlplane.gateway.serve_rules import on_worker_broken, on_worker_gone, on_worker_said, on_worker_up
from controlplane.gateway.state import GatewayState, WorkerPhase
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.route import JournalPhase, Outcome, RouteCause
from controlplane.runtime.messages.serve import FinishReason


def step(state: GatewayState, event: Event, now: float) -> list[Effect]:
    """Apply `event` at monotonic time `now` (seconds) and say what must be done, in this order."""
    match event:
        case WorkerSaid():
            return on_worker_said(state, event.worker, event.body, now)
        case LeaderSaid():
            return on_leader_said(state, event.body, now)
        case RequestAccepted():
            return on_accepted(state, event, now)
        case ClientDrained():
            return on_client_drained(state, event)
        case ChoiceStopped():
            return on_choice_stopped(state, event)
        case ClientGone():
            return on_client_gone(state, event)
        case LeaderOpened():
            return on_leader_opened(state, event.term)
        case LeaderLost():
            return on_leader_lost(state, now)
        case WorkerUp():
            return on_worker_up(state, event.worker, now)
        case WorkerBroken():
            return on_worker_broken(state, event.worker, event.heard, now)
        case WorkerGone():
            return on_worker_gone(state, event.worker, event.reason, now)
        case Tick():
            return on_tick(state, now)
        case ResumeAsked():
            return on_resume_asked(state, event, now)
        case ResumeDropped():
            return on_resume_dropped(state, event)
        case StreamAdopted():
            return on_adopted(state, event, now)


def on_accepted(state: GatewayState, asked: RequestAccepted, now: float) -> list[Effect]:
    if asked.request in state.journals:
        reason = Reason(kind=ReasonKind.INVALID, text=f"request {asked.request} is already open")
        return [Failed(asked.request, Failure.INVALID, reason)]
    journal = new_journal(asked, now)
    limit = state.limits.journal_tokens_max
    if state.journal_tokens + journal.prompt_tokens > limit:
        reason = Reason(kind=ReasonKind.OVERLOADED, text=f"the gateway's journals hold their {limit} tokens")
        return [Failed(asked.request, Failure.OVERLOADED, reason, round(state.timings.stage * 1000))]
    state.journals[asked.request] = journal
    state.journal_tokens += journal.prompt_tokens
    return ask(state, journal, now)


def on_client_drained(state: GatewayState, event: ClientDrained) -> list[Effect]:
    journal = state.journals.get(event.request)
    if journal is None:
        return []
    assert journal.finished, "a client cannot have drained what is not finished"
    return close(state, journal, Outcome.FINISHED)


def on_choice_stopped(state: GatewayState, event: ChoiceStopped) -> list[Effect]:
    journal = state.journals.get(event.request)
    if journal is None:
        return []
    choice = journal.choices[event.choice]
    if choice.finished is not None:
        return []
    slot, place = choice.slot, journal.placement
    finish_choice(state, journal, choice, FinishReason.STOP)
    if slot is None or place is None or not journal.opened:
        return []
    return cancel_slots(state, place.worker, (slot,), Reason(kind=ReasonKind.CANCELLED, text="stop string"))


def on_client_gone(state: GatewayState, event: ClientGone) -> list[Effect]:
    journal = state.journals.get(event.request)
    if journal is None:
        return []
    return leave(state, journal, Reason(kind=ReasonKind.CLIENT_GONE)) + close(state, journal, Outcome.CANCELLED)


def on_tick(state: GatewayState, now: float) -> list[Effect]:
    """Review what is due; look at deadlines and idle streams once every heartbeat interval."""
    effects = end_late(state, now)
    while state.timers and state.timers[0][0] <= now:
        _, request = heapq.heappop(state.timers)
        if (journal := state.journals.get(request)) is not None:
            effects += review(state, journal, now)
    if now < state.scan_at:
        return effects
    state.scan_at = now + state.timings.heartbeat_interval
    for journal in list(state.journals.values()):
        if now >= journal.asked.deadline and not journal.finished:
            reason = Reason(kind=ReasonKind.DEADLINE, text="the request's deadline passed")
            effects += fail(state, journal, Failure.DEADLINE, reason, now)
    return effects + drop_idle_workers(state)


def review(state: GatewayState, journal: Journal, now: float) -> list[Effect]:
    """Whatever of the journal's times has come."""
    timings = state.timings
    if journal.open_by is not None and now >= journal.open_by:
        return unreachable(state, journal, now)
    if journal.phase != JournalPhase.ROUTING:
        return []
    since = journal.starved_since
    if since is not None and not journal.admitted and now >= since + timings.leader_grace:
        text = "no replica can take the request" if state.leader_up else "no leading coordinator can be reached"
        reason = Reason(kind=ReasonKind.NO_CAPACITY, text=text)
        return fail(state, journal, Failure.UNAVAILABLE, reason, now, round(timings.stage * 1000))
    if journal.ask_at is not None and now >= journal.ask_at:
        return ask(state, journal, now)
    return []


def unreachable(state: GatewayState, journal: Journal, now: float) -> list[Effect]:
    """Its worker did not come back, or did not answer the body, in time."""
    place = journal.placement
    assert place is not None
    text = f"worker {place.node} at {place.worker} did not answer in time"
    reason = Reason(kind=ReasonKind.SESSION_SILENT, text=text, node=place.node)
    return move_on(state, journal, RouteCause.UNREACHABLE, reason, now)


def drop_idle_workers(state: GatewayState) -> list[Effect]:
    """Streams that no replica, no journal and no search needs, unless the worker has still to be told something.

    Those that are up are kept while the leader may not have heard of all workers: through them such a one hears of the
    leader, and can be asked for what it holds.
    """
    if not state.leader_up:
        return []
    needed: set[WorkerKey] = {WorkerKey(row.serve_address) for row in state.rows.values()}
    for journal in state.journals.values():
        needed.update(journal.visited)
        if journal.placement is not None:
            needed.add(journal.placement.worker)
    for search in state.searches.values():
        needed.update(search.waiting, search.parts)
    if state.complete_at is None:
        needed.update(key for key, worker in state.workers.items() if worker.phase == WorkerPhase.UP)
    idle = [key for key in state.workers if key not in needed]
    for key in idle:
        del state.workers[key]
    return [DropWorker(key) for key in idle]
