"""Frames between a gateway and a worker daemon (Serve).

Mirrors protos/perdure/v1/serve.proto field by field; wire.py checks that at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from controlplane.runtime.ids import Attempt, ClusterId, Incarnation, RequestId, Slot, Term
from controlplane.runtime.messages.common import Permit, Reason, Sampling


class FinishReason(IntEnum):
    LENGTH = 1
    # An end-of-sequence or stop token; it is the last token delivered.
    STOP = 2
    CANCELLED = 3
    ERROR = 4


class OpenCode(IntEnum):
    STALE_TERM = 1
    STALE_EPOCH = 2
    FULL = 3
    DRAINING = 4
    TOO_LONG = 5
    DUPLICATE = 6
    INVALID = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeHello:
    """Both directions. A peer cut off from etcd learns of a new leader here."""

    cluster: ClusterId
    # Gateway or node name of the sender.
    name: str
    incarnation: Incarnation
    highest_term_seen: Term
    leader_address: str
    heartbeat_interval_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCursor:
    slot: Slot
    request: RequestId
    choice: int
    attempt: Attempt
    # Index of the first token not yet in the journal.
    next_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncSlots:
    slots: tuple[SlotCursor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    index: int
    # Minted by the gateway, never reused in a stream's life.
    slot: Slot
    # Seed of this choice's draws.
    seed: int
    # Tokens delivered by earlier attempts.
    delivered: bytes = b""
    # Already finished in an earlier attempt: holds no slot.
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    permit: Permit
    choices: tuple[Choice, ...] = ()
    prompt: bytes
    sampling: Sampling
    # Seeds the prefix hash chain, so that tenants never share or time each other's cache.
    tenant_salt: str = ""
    # What another gateway needs to render this stream; opaque to the worker. At most 64 KiB.
    render: bytes = b""
    # A disconnect does not cancel.
    resumable: bool = False
    remaining_ms: int = 0
    allow_cached: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelSlots:
    slots: tuple[Slot, ...] = ()
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRequests:
    """Frees the shadows. Sent after the client's socket drained."""

    requests: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest:
    request: RequestId
    # Tokens the client has seen, by choice.
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeHeartbeat:
    """A peer cut off from etcd learns of a new leader here too."""

    highest_term_seen: Term
    leader_address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    slot: Slot
    reason: FinishReason
    stop_id: int | None = None
    error: Reason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log probabilities of one token: of the chosen one, then of the `count` best."""

    slot: Slot
    index: int
    chosen: float
    # Rank of the chosen token among all, from 1; 0: not computed.
    chosen_rank: int = 0
    # Packed u32.
    top_ids: bytes = b""
    # Packed f32.
    top_values: bytes = b""
    # The token is part of the prompt; index counts prompt positions.
    prompt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """One per engine step and gateway, all its sequences in it.

    Columns run in parallel: slots[i] got counts[i] tokens, the first of them at index first_index[i]; `tokens`
    holds them one after the other. All four are packed (packing.py).
    """

    slots: bytes
    first_index: bytes
    counts: bytes
    tokens: bytes
    logprobs: tuple[TokenLogprobs, ...] = ()
    # In the same message as the last token.
    finish: tuple[Finish, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    request: RequestId
    attempt: Attempt
    # Prompt tokens found in the prefix cache.
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRefused:
    request: RequestId
    attempt: Attempt
    code: OpenCode
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReply:
    known: tuple[Slot, ...] = ()
    unknown: tuple[Slot, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsLost:
    slots: tuple[Slot, ...] = ()
    reason: Reason
    # The sequences were in the step that killed the engine.
    suspect: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDraining:
    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Superseded:
    """Another gateway resumed the request."""

    request: RequestId
    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """The worker's copy of a request, in chunks."""

    request: RequestId
    attempt: Attempt
    prompt: bytes
    choices: tuple[Choice, ...] = ()
    sampling: Sampling
    render: bytes
    last: bool = True
    # Unknown here.
    missing: bool = False
    # Where it ran, under the raised attempt. In the first chunk, as all below.
    permit: Permit | None = None
    # Budget left until its deadline; 0: none.
    remaining_ms: int = 0
    # Prompt tokens that its first prefill found in the prefix cache.
    cached_tokens: int = 0


ServeUp = ServeHello | SyncSlots | OpenRequest | CancelSlots | EndRequests | ResumeRequest


ServeDown = (
    ServeHello
    | StepTokens
    | Admitted
    | OpenRefused
    | SyncReply
    | SlotsLost
    | WorkerDraining
    | Superseded
    | Shadow
    | ServeHeartbeat
)
