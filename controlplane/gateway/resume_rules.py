"""Streams that outlive their gateway: find the newest shadow among the workers, and go on from it. Pure.

Only workers know what they hold, so all are asked at once; no leader is needed. Each that has a shadow hands it over
under a raised attempt; the newest wins, and the others go with the journal's End.
"""
# pyright: strict

from __future__ import annotations

from dataclasses import replace

from controlplane.gateway.journal import ChoiceJournal, Journal, Placement
from controlplane.gateway.messages import (
    ChoiceSeen,
    Effect,
    Failed,
    Failure,
    ResumeAsked,
    ResumeDropped,
    SendWorker,
    ShadowFound,
    StreamAdopted,
    TellJournal,
    WorkerKey,
)
from controlplane.gateway.request_rules import release_slot, want_worker
from controlplane.gateway.state import GatewayState, Search, WorkerPhase
from controlplane.runtime.ids import NodeId
from controlplane.runtime.messages import serve
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.route import JournalPhase, ReplicaEpoch
from controlplane.runtime.messages.serve import EndRequests, FinishReason, ResumeRequest, Shadow, SyncSlots
from controlplane.runtime.packing import unpack_u32

RETRIES_UNTOLD = 3
"""Retries of a request whose deployment the leader has not told of yet."""

_NOWHERE = WorkerKey("")


def on_resume_asked(state: GatewayState, asked: ResumeAsked, now: float) -> list[Effect]:
    """Ask every worker for the shadow. A journal of our own is let go first: its tokens are at its worker."""
    request = asked.request
    assert request not in state.searches, "one search a stream"
    effects: list[Effect] = []
    own = state.journals.get(request)
    if own is not None:
        if not _is_at_worker(state, own):
            text = "the stream is being moved to another replica"
            return [_missing(request, Reason(kind=ReasonKind.NO_CAPACITY, text=text), certain=False)]
        effects += _let_go(state, own)
    for key, node in state.told.items():
        effects += want_worker(state, key, node)
    search = Search(
        request,
        deadline=now + state.timings.session_silence,
        waiting=set(state.workers),
        informed=_knows_all(state, now),
    )
    state.searches[request] = search
    for key, worker in state.workers.items():
        if worker.phase == WorkerPhase.UP:
            effects.append(SendWorker(key, ResumeRequest(request=request)))
    return effects


def _knows_all(state: GatewayState, now: float) -> bool:
    """The leader says that it knows of every worker that may be alive, has said so lately, and each is asked: one whose
    replica does not serve at present, or has moved on without it, may hold the stream."""
    if state.complete_at is None or now - state.complete_at >= state.timings.session_silence:
        return False
    told = state.told.keys() | {WorkerKey(row.serve_address) for row in state.rows.values() if row.serve_address}
    return bool(told) and told <= state.workers.keys()


def _is_at_worker(state: GatewayState, journal: Journal) -> bool:
    """A worker that can be asked has all its tokens."""
    place = journal.placement
    if place is None or not journal.opened:
        return journal.finished
    return state.workers[place.worker].phase == WorkerPhase.UP


def _let_go(state: GatewayState, journal: Journal) -> list[Effect]:
    """Forget the journal, and leave its sequences as they are."""
    for choice in journal.choices:
        release_slot(state, choice)
    del state.journals[journal.request]
    state.journal_tokens -= journal.prompt_tokens + journal.delivered_tokens
    reason = Reason(kind=ReasonKind.SUPERSEDED, text="the stream was resumed by another client")
    return [Failed(journal.request, Failure.SUPERSEDED, reason)]


def on_resume_dropped(state: GatewayState, dropped: ResumeDropped) -> list[Effect]:
    """Workers keep what they hold: the client may come again."""
    state.searches.pop(dropped.request, None)
    return []


def ask_again(state: GatewayState, key: WorkerKey) -> list[Effect]:
    """The worker's stream is new: whatever is searched for is asked of it, from the first chunk."""
    for search in state.searches.values():
        search.waiting.add(key)
        search.silent.discard(key)
        search.parts.pop(key, None)
    return [SendWorker(key, ResumeRequest(request=request)) for request in state.searches]


def on_shadow(state: GatewayState, key: WorkerKey, chunk: Shadow) -> list[Effect]:
    """One chunk of a worker's answer; with the last of the last worker the search is over."""
    search = state.searches.get(chunk.request)
    if search is None or key not in search.waiting:
        # Too late: the client may come again, so the worker keeps it.
        return []
    if not chunk.missing:
        known = search.parts.get(key)
        search.parts[key] = chunk if known is None else _with_choices(known, chunk)
    if chunk.last:
        search.waiting.discard(key)
    return conclude(state, search)


def _with_choices(known: Shadow, chunk: Shadow) -> Shadow:
    """A choice that comes again says the same."""
    held = {choice.index for choice in known.choices}
    return replace(known, choices=(*known.choices, *(one for one in chunk.choices if one.index not in held)))


def give_up(state: GatewayState, key: WorkerKey) -> list[Effect]:
    """The worker cannot be reached. That it is gone, and what it held with it, is sure once the leader says so, too:
    something on the way may refuse connections of a living one."""
    effects: list[Effect] = []
    for search in list(state.searches.values()):
        if key in search.waiting:
            search.waiting.discard(key)
            search.parts.pop(key, None)
            if key in state.told:
                search.silent.add(key)
            effects += conclude(state, search)
    return effects


def end_late(state: GatewayState, now: float) -> list[Effect]:
    """Searches whose time is over end with what was found."""
    effects: list[Effect] = []
    for search in list(state.searches.values()):
        if now >= search.deadline:
            search.silent |= search.waiting
            search.waiting.clear()
            effects += conclude(state, search)
    return effects


def conclude(state: GatewayState, search: Search) -> list[Effect]:
    """Answer once nobody is waited for: the newest shadow, or why there is none."""
    if search.waiting:
        return []
    del state.searches[search.request]
    whole = {key: part for key, part in search.parts.items() if key not in search.silent}
    if not whole:
        return [_not_found(state, search)]
    key = max(whole, key=lambda key: whole[key].attempt)
    effects: list[Effect] = []
    for other in whole:
        if other != key and state.workers[other].phase == WorkerPhase.UP:
            effects.append(SendWorker(other, EndRequests(requests=(search.request,))))
    found = Reason(kind=ReasonKind.SUPERSEDED, text=f"found on {state.workers[key].node}")
    return [*effects, ShadowFound(search.request, key, state.workers[key].node, whole[key], found)]


def _not_found(state: GatewayState, search: Search) -> ShadowFound:
    if not state.workers:
        text = "this gateway knows no worker yet"
    elif not search.informed:
        text = "no worker that this gateway knows of holds it, and others may be there"
    elif search.silent:
        text = f"no worker that answers holds it; {', '.join(sorted(search.silent))} did not answer"
    else:
        text = "no worker holds it: it was ended, its time to be resumed is over, or its worker died with its gateway"
    reason = Reason(kind=ReasonKind.UNKNOWN_ID, text=text)
    return _missing(search.request, reason, certain=search.informed and bool(state.workers) and not search.silent)


def _missing(request: serve.RequestId, reason: Reason, *, certain: bool) -> ShadowFound:
    return ShadowFound(request, _NOWHERE, NodeId(""), None, reason, certain)


def on_adopted(state: GatewayState, event: StreamAdopted, now: float) -> list[Effect]:
    """Open a journal that stands where its client is, and sync with the worker from there."""
    asked, shadow, key = event.asked, event.shadow, event.worker
    assert asked.request not in state.journals, "a search lets an own journal go"
    assert shadow.permit is not None, "the first chunk names where it ran"
    assert len(shadow.choices) == len(event.seen)
    choices = [_choice(choice, seen) for choice, seen in zip(shadow.choices, event.seen, strict=True)]
    journal = Journal(asked=asked, created=now, choices=choices, attempt=shadow.attempt, admitted=True)
    state.max_retries.setdefault(asked.deployment, RETRIES_UNTOLD)
    effects = want_worker(state, key, event.node)
    state.journals[asked.request] = journal
    state.journal_tokens += journal.prompt_tokens + journal.delivered_tokens
    journal.visited[key] = None
    if journal.finished:
        journal.phase = JournalPhase.DRAINING_CLIENT
        return effects
    permit = shadow.permit
    journal.placement = Placement(ReplicaEpoch(replica=permit.replica, epoch=permit.epoch), key, event.node, permit)
    journal.phase, journal.opened = JournalPhase.SYNCING, True
    for choice in choices:
        if choice.finished is None:
            choice.slot = state.mint_slot()
            state.slots[choice.slot] = (journal, choice)
    journal.open_by = state.wake_at(now + state.timings.stage, journal)
    if state.workers[key].phase == WorkerPhase.UP:
        effects.append(SendWorker(key, SyncSlots(slots=tuple(journal.cursors()))))
    if state.leader_up:
        effects.append(TellJournal(journal.info(now)))
    return effects


def _choice(shadow: serve.Choice, seen: ChoiceSeen) -> ChoiceJournal:
    tokens = unpack_u32(shadow.delivered)
    assert seen.tokens <= len(tokens), "the edge compares what the client has with what there is"
    return ChoiceJournal(
        index=shadow.index,
        seed=shadow.seed,
        tokens=tokens[: seen.tokens],
        finished=FinishReason.STOP if seen.finished else None,
    )
