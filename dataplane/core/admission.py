"""Whether an Open may run: the permit's fences, the replica's room, the body's form."""

from __future__ import annotations

from controlplane.runtime.ids import RequestId
from controlplane.runtime.messages.common import Permit, PermitMode, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.serve import OpenCode, OpenRequest
from dataplane.core.state import RENDER_BYTES_MAX, Replica, Stream, WorkerState

Refusal = tuple[OpenCode, Reason]

TOKEN_BYTES = 4


def judge(state: WorkerState, stream: Stream, message: OpenRequest) -> Refusal | None:
    """Why the body must not run here; None if it may. Shadows' bound aside."""
    return (
        _judge_form(stream, message)
        or _judge_term(state, message.permit)
        or _judge_attempt(state, message.permit)
        or _judge_place(state, message.permit)
        or _judge_size(state, message)
    )


def _judge_form(stream: Stream, message: OpenRequest) -> Refusal | None:
    def wrong(text: str) -> Refusal:
        return OpenCode.INVALID, Reason(kind=ReasonKind.INVALID, text=text)

    live = [choice for choice in message.choices if not choice.finished]
    slots = {choice.slot for choice in live}
    if not message.prompt or len(message.prompt) % TOKEN_BYTES:
        return wrong(f"prompt: {len(message.prompt)} bytes are no packed tokens")
    if not live:
        return wrong("choices: none is left to run")
    if len({choice.index for choice in message.choices}) < len(message.choices):
        return wrong("choices: an index stands twice")
    if any(len(choice.delivered) % TOKEN_BYTES for choice in message.choices):
        return wrong("choices: delivered is no packed tokens")
    if len(slots) < len(live) or slots & stream.slots.keys():
        return wrong("choices: a slot is taken")
    if len(message.render) > RENDER_BYTES_MAX:
        return wrong(f"render: {len(message.render)} bytes are more than {RENDER_BYTES_MAX}")
    return None


def _judge_term(state: WorkerState, permit: Permit) -> Refusal | None:
    if permit.term < state.highest_term:
        text = f"the permit's term {permit.term} is below {state.highest_term}"
        return OpenCode.STALE_TERM, Reason(kind=ReasonKind.STALE_TERM, text=text)
    if permit.mode is PermitMode.LEADERLESS and state.leader is not None and state.leader.session is not None:
        text = "a leader is live: only its permits count"
        return OpenCode.STALE_TERM, Reason(kind=ReasonKind.STALE_TERM, text=text)
    return None


def _judge_attempt(state: WorkerState, permit: Permit) -> Refusal | None:
    held = state.requests.get(permit.request)
    if held is not None and held.attempt >= permit.attempt:
        text = f"attempt {held.attempt} is here already"
        return OpenCode.DUPLICATE, Reason(kind=ReasonKind.SUPERSEDED, text=text)
    return None


def _judge_place(state: WorkerState, permit: Permit) -> Refusal | None:
    if state.draining:
        return OpenCode.DRAINING, state.leaving or Reason(kind=ReasonKind.DRAINING, node=state.identity.node)
    replica = state.replicas.get(permit.replica)
    here = replica is not None and replica.phase is ReplicaPhase.READY and replica.driver is not None
    if replica is None or not here or replica.epoch != permit.epoch:
        current = state.epochs.get(permit.replica, 0)
        text = f"{permit.replica} does not serve epoch {permit.epoch} here (highest known: {current})"
        return OpenCode.STALE_EPOCH, Reason(kind=ReasonKind.STALE_EPOCH, text=text, group=permit.replica)
    return None


def _judge_size(state: WorkerState, message: OpenRequest) -> Refusal | None:
    permit = message.permit
    replica = state.replicas[permit.replica]
    capacity = replica.capacity
    assert capacity is not None, "a ready replica has a capacity"
    longest = max(len(choice.delivered) for choice in message.choices if not choice.finished)
    tokens = (len(message.prompt) + longest) // TOKEN_BYTES + 1
    tokens_max = min(capacity.max_model_tokens, capacity.total_blocks * capacity.block_tokens)
    if tokens > tokens_max:
        text = f"{tokens} tokens are more than the {tokens_max} that {permit.replica} holds"
        return OpenCode.TOO_LONG, Reason(kind=ReasonKind.INVALID, text=text, group=permit.replica)
    wanted = sum(not choice.finished for choice in message.choices)
    admitted = admitted_sequences(state, replica, permit.request)
    limit = capacity.max_sequences * state.limits.admission_factor
    if admitted and admitted + wanted > limit:
        text = f"{permit.replica} holds {admitted} sequences of {limit}"
        return OpenCode.FULL, Reason(kind=ReasonKind.OVERLOADED, text=text, group=permit.replica)
    return None


def admitted_sequences(state: WorkerState, replica: Replica, apart_from: RequestId) -> int:
    """Sequences running, waiting or reserved on the replica, those of one request not counted."""
    running = sum(
        request.permit.replica == replica.replica and request.request != apart_from
        for request, _ in state.sequences.values()
    )
    reserved = sum(
        reservation.permit.replica == replica.replica and request != apart_from
        for request, reservation in state.reservations.items()
    )
    return running + reserved
