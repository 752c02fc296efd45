"""What workers say, and what becomes of their streams. Pure."""
# pyright: strict

from __future__ import annotations

from array import array

from controlplane.gateway.journal import ChoiceJournal, Journal, take_fresh
from controlplane.gateway.messages import (
    Counted,
    Deliver,
    Effect,
    Failure,
    SendWorker,
    Started,
    TellFirstToken,
    WorkerKey,
)
from controlplane.gateway.request_rules import fail, finish_choice, move_on, send_body
from controlplane.gateway.resume_rules import ask_again, give_up, on_shadow
from controlplane.gateway.route_rules import PLANNED_KINDS
from controlplane.gateway.state import GatewayState, WorkerPhase
from controlplane.runtime.ids import Slot
from controlplane.runtime.messages.common import SOLO_TOKENS, Reason, ReasonKind
from controlplane.runtime.messages.route import FirstToken, JournalPhase, RouteCause
from controlplane.runtime.messages.serve import (
    Admitted,
    EndRequests,
    Finish,
    FinishReason,
    OpenCode,
    OpenRefused,
    ServeDown,
    Shadow,
    SlotCursor,
    SlotsLost,
    StepTokens,
    Superseded,
    SyncReply,
    SyncSlots,
    TokenLogprobs,
)
from controlplane.runtime.packing import unpack_u32

_NO_TOKENS: array[int] = array("I")
_COMPLETE = frozenset({FinishReason.STOP, FinishReason.LENGTH})


def on_worker_up(state: GatewayState, key: WorkerKey, now: float) -> list[Effect]:
    """Sync what it may have, tell it which requests ended meanwhile, then send the bodies that wait."""
    worker = state.workers.get(key)
    if worker is None:
        return []
    worker.phase, worker.back_by = WorkerPhase.UP, None
    placed = [journal for journal in state.placed_on(key) if not journal.finished]
    cursors: list[SlotCursor] = []
    for journal in placed:
        if journal.opened:
            cursors += journal.cursors()
            journal.open_by = state.wake_at(now + state.timings.stage, journal)
    # Even an empty Sync says something: what the worker still runs of ours, nobody waits for.
    effects: list[Effect] = [SendWorker(key, SyncSlots(slots=tuple(cursors)))]
    if worker.owed_ends:
        effects.append(SendWorker(key, EndRequests(requests=tuple(worker.owed_ends))))
    worker.owed_ends.clear()
    for journal in placed:
        if not journal.opened:
            effects += send_body(state, journal, now)
    return effects + ask_again(state, key)


def on_worker_broken(state: GatewayState, key: WorkerKey, heard: float, now: float) -> list[Effect]:
    """A broken stream is not a failure: the worker has until `back_by` to be reached again."""
    worker = state.workers.get(key)
    if worker is None or worker.phase == WorkerPhase.BROKEN:
        return []
    worker.phase, worker.broken_at = WorkerPhase.BROKEN, now
    worker.back_by = max(heard + state.timings.session_silence, now + state.timings.heartbeat_interval)
    for journal in state.placed_on(key):
        if journal.finished:
            continue
        journal.open_by = state.wake_at(worker.back_by, journal)
        if journal.opened:
            journal.phase = JournalPhase.SYNCING
    return []


def on_worker_gone(state: GatewayState, key: WorkerKey, reason: Reason, now: float) -> list[Effect]:
    worker = state.workers.get(key)
    if worker is None or worker.phase == WorkerPhase.UP:
        return []
    if worker.phase != WorkerPhase.BROKEN:
        worker.phase, worker.broken_at = WorkerPhase.BROKEN, now
    effects = give_up(state, key)
    for journal in state.placed_on(key):
        if not journal.finished:
            effects += move_on(state, journal, RouteCause.LOST, reason, now)
    return effects


def on_worker_said(state: GatewayState, key: WorkerKey, body: ServeDown, now: float) -> list[Effect]:
    match body:
        case StepTokens():
            return on_step_tokens(state, key, body, now)
        case Admitted():
            return on_admitted(state, body)
        case OpenRefused():
            return on_open_refused(state, key, body, now)
        case SyncReply():
            return on_sync_reply(state, key, body, now)
        case SlotsLost():
            return on_slots_lost(state, key, body, now)
        case Superseded():
            return on_superseded(state, body, now)
        case Shadow():
            return on_shadow(state, key, body)
        case _:
            # A draining worker's requests are moved by the leader; hellos and heartbeats are the stream's own affair.
            return []


def on_step_tokens(state: GatewayState, key: WorkerKey, step: StepTokens, now: float) -> list[Effect]:
    """One engine step: apply the delivery rule to every sequence in it, tokens and finish together."""
    effects: list[Effect] = []
    slots, first, counts = unpack_u32(step.slots), unpack_u32(step.first_index), unpack_u32(step.counts)
    tokens = unpack_u32(step.tokens)
    finishes = {finish.slot: finish for finish in step.finish if finish.reason != FinishReason.CANCELLED}
    logprobs = _by_slot(step.logprobs)
    gaps: list[SlotCursor] = []
    start = 0
    for row, slot in enumerate(slots):
        count = counts[row]
        finish, details = finishes.pop(Slot(slot), None), logprobs.pop(Slot(slot), None)
        owner = _owner(state, key, slot)
        if owner is None:
            effects.append(Counted("tokens_stale", count))
        else:
            effects += _take(state, *owner, first[row], tokens[start : start + count], finish, details, gaps, now)
        start += count
    # A finish without a token answers a replay that had nothing left; logprobs without one are the prompt's.
    for slot in (*finishes, *(slot for slot in logprobs if slot not in finishes)):
        if (owner := _owner(state, key, slot)) is not None:
            next_index = len(owner[1].tokens)
            effects += _take(state, *owner, next_index, _NO_TOKENS, finishes.get(slot), logprobs.get(slot), gaps, now)
    if gaps:
        effects.append(Counted("gaps", len(gaps)))
        if state.workers[key].phase == WorkerPhase.UP:
            effects.append(SendWorker(key, SyncSlots(slots=tuple(gaps))))
    effects = _fail_erroneous(state, step.finish, effects, now)
    return effects + _replay_given_up(state, key, step.finish, now)


def _replay_given_up(state: GatewayState, key: WorkerKey, finishes: tuple[Finish, ...], now: float) -> list[Effect]:
    """Choices that a former gateway of the stream had cancelled, to run them elsewhere: they go on as ours."""
    effects: list[Effect] = []
    reason = Reason(kind=ReasonKind.REPLACED, text="the stream's former gateway had moved it on")
    for finish in finishes:
        if finish.reason == FinishReason.CANCELLED and (owner := _owner(state, key, finish.slot)) is not None:
            effects += move_on(state, owner[0], RouteCause.PLANNED, reason, now, exclude=False)
    return effects


def _owner(state: GatewayState, key: WorkerKey, slot: int) -> tuple[Journal, ChoiceJournal] | None:
    owner = state.slots.get(Slot(slot))
    if owner is None:
        return None
    place = owner[0].placement
    return owner if place is not None and place.worker == key else None


def _take(
    state: GatewayState,
    journal: Journal,
    choice: ChoiceJournal,
    first_index: int,
    tokens: array[int],
    finish: Finish | None,
    logprobs: list[TokenLogprobs] | None,
    gaps: list[SlotCursor],
    now: float,
) -> list[Effect]:
    room = journal.asked.sampling.max_tokens - first_index
    fresh = take_fresh(choice, first_index, tokens[: max(room, 0)])
    if fresh is None:
        if not choice.gap:
            choice.gap = True
            gaps.extend(cursor for cursor in journal.cursors() if cursor.slot == choice.slot)
        return [Counted("tokens_ahead", len(tokens))]
    effects: list[Effect] = []
    if journal.phase == JournalPhase.OPENING:
        effects += _started(journal, 0)
    journal.moved_at = now
    if fresh and journal.stuck_since is not None:
        effects += _tell_first_token(state, journal, now)
    if len(fresh) < len(tokens):
        effects.append(Counted("tokens_repeated", len(tokens) - len(fresh)))
    state.journal_tokens += len(fresh)
    journal.attempt_tokens += len(fresh)
    if journal.crashes and journal.attempt_tokens >= SOLO_TOKENS:
        journal.acquit()
    next_index = len(choice.tokens)
    details = _fresh_logprobs(choice, logprobs, next_index - len(fresh), next_index) if logprobs else ()
    if fresh or finish or details:
        effects.append(Deliver(journal.request, choice.index, next_index - len(fresh), fresh, details, finish))
    if finish is not None:
        finish_choice(state, journal, choice, finish.reason)
    return effects


def _tell_first_token(state: GatewayState, journal: Journal, now: float) -> list[Effect]:
    """The leader keeps the timeline of failures: its last step is known here alone."""
    assert journal.stuck_since is not None
    gap_ms, journal.stuck_since = round((now - journal.stuck_since) * 1000), None
    if not state.leader_up:
        return []
    return [TellFirstToken(FirstToken(request=journal.request, attempt=journal.attempt, gap_ms=gap_ms))]


def _fresh_logprobs(
    choice: ChoiceJournal, logprobs: list[TokenLogprobs], first: int, end: int
) -> tuple[TokenLogprobs, ...]:
    """Those of fresh tokens, and of prompt positions not yet seen: a replay sends the prompt's again."""
    fresh: list[TokenLogprobs] = []
    for item in logprobs:
        if not item.prompt:
            if first <= item.index < end:
                fresh.append(item)
        elif item.index >= choice.prompt_next:
            choice.prompt_next = item.index + 1
            fresh.append(item)
    return tuple(fresh)


def _by_slot(logprobs: tuple[TokenLogprobs, ...]) -> dict[Slot, list[TokenLogprobs]]:
    grouped: dict[Slot, list[TokenLogprobs]] = {}
    for item in logprobs:
        grouped.setdefault(item.slot, []).append(item)
    return grouped


def _fail_erroneous(
    state: GatewayState, finishes: tuple[Finish, ...], effects: list[Effect], now: float
) -> list[Effect]:
    """A choice that its engine could not compute, or that was cancelled under us, ends its request with that reason."""
    if all(finish.reason in _COMPLETE for finish in finishes):
        return effects
    kept: list[Effect] = []
    for effect in effects:
        if not isinstance(effect, Deliver) or (finish := effect.finish) is None or finish.reason in _COMPLETE:
            kept.append(effect)
        elif (journal := state.journals.get(effect.request)) is not None:
            text = f"the engine ended the sequence: {finish.reason.name.lower()}"
            reason = finish.error or Reason(kind=ReasonKind.CANCELLED, text=text)
            late = reason.kind == ReasonKind.DEADLINE
            kept += fail(state, journal, Failure.DEADLINE if late else Failure.ENGINE, reason, now)
    return kept


def _started(journal: Journal, cached_tokens: int) -> list[Effect]:
    journal.phase = JournalPhase.RUNNING
    journal.open_by = None
    journal.refusals = 0
    first, journal.admitted = not journal.admitted, True
    return [Started(journal.request, cached_tokens)] if first or cached_tokens else []


def on_admitted(state: GatewayState, admitted: Admitted) -> list[Effect]:
    """Comes when the body was taken, and again when its prefill found something in the prefix cache."""
    journal = state.journals.get(admitted.request)
    if journal is None or admitted.attempt != journal.attempt or journal.finished:
        return []
    if journal.phase == JournalPhase.OPENING:
        return _started(journal, admitted.cached_tokens)
    return [Started(journal.request, admitted.cached_tokens)] if admitted.cached_tokens else []


def on_open_refused(state: GatewayState, key: WorkerKey, refused: OpenRefused, now: float) -> list[Effect]:
    """The worker is the last to judge; most refusals are races with a planned change and cost no retry."""
    journal = state.journals.get(refused.request)
    if journal is None or refused.attempt != journal.attempt or journal.finished:
        return [Counted("open_refused_stale")]
    place = journal.placement
    if place is None or place.worker != key:
        return [Counted("open_refused_stale")]
    if refused.code == OpenCode.TOO_LONG:
        return fail(state, journal, Failure.TOO_LONG, refused.reason, now)
    if refused.code == OpenCode.INVALID:
        return fail(state, journal, Failure.INVALID, refused.reason, now)
    journal.refusals += 1
    if journal.refusals > state.limits.refusals_max:
        return fail(state, journal, Failure.OVERLOADED, refused.reason, now, round(state.timings.stage * 1000))
    delay = 0.0
    if journal.refusals > 1:
        delay = min(state.timings.reconnect_min * 2 ** (journal.refusals - 2), state.timings.reconnect_max)
    exclude = refused.code in (OpenCode.STALE_EPOCH, OpenCode.FULL, OpenCode.DRAINING)
    return move_on(state, journal, RouteCause.PLANNED, refused.reason, now, exclude=exclude, delay=delay)


def on_sync_reply(state: GatewayState, key: WorkerKey, reply: SyncReply, now: float) -> list[Effect]:
    effects: list[Effect] = []
    lost = Reason(kind=ReasonKind.UNKNOWN_ID, text="the worker no longer knows the sequence")
    for slot in reply.unknown:
        if (owner := _owner(state, key, slot)) is not None:
            effects += move_on(state, owner[0], RouteCause.LOST, lost, now)
    known = frozenset(reply.known)
    for slot in reply.known:
        owner = _owner(state, key, slot)
        if owner is None:
            continue
        journal, choice = owner
        choice.gap = False
        if journal.phase == JournalPhase.SYNCING and known.issuperset(journal.live_slots()):
            effects += _started(journal, 0)
    return effects


def on_slots_lost(state: GatewayState, key: WorkerKey, lost: SlotsLost, now: float) -> list[Effect]:
    effects: list[Effect] = []
    cause = RouteCause.PLANNED if lost.reason.kind in PLANNED_KINDS else RouteCause.LOST
    for slot in lost.slots:
        # The first slot of a request moves all of it; its other slots are gone then.
        if (owner := _owner(state, key, slot)) is not None:
            effects += move_on(state, owner[0], cause, lost.reason, now, crashed=lost.suspect)
    return effects


def on_superseded(state: GatewayState, superseded: Superseded, now: float) -> list[Effect]:
    journal = state.journals.get(superseded.request)
    if journal is None or superseded.attempt <= journal.attempt:
        return []
    reason = Reason(kind=ReasonKind.SUPERSEDED, text="the stream was resumed at another gateway")
    return fail(state, journal, Failure.SUPERSEDED, reason, now)
