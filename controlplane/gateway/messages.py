"""What goes into the gateway's core and what comes out: `step(state, event, now) -> effects`.

Frames of the leader and of workers pass through as they are (controlplane.runtime.messages); here stand the rest.
"""
# pyright: strict

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum
from typing import NewType

from controlplane.runtime.ids import DeploymentId, NodeId, RequestId, Term
from controlplane.runtime.messages.common import Reason, Sampling
from controlplane.runtime.messages.route import EndEntry, FirstToken, JournalInfo, RouteDown, RouteEntry
from controlplane.runtime.messages.serve import (
    CancelSlots,
    EndRequests,
    Finish,
    OpenRequest,
    ResumeRequest,
    ServeDown,
    Shadow,
    SyncSlots,
    TokenLogprobs,
)

WorkerKey = NewType("WorkerKey", str)
"""A worker daemon's serve address: the name of the one Serve stream to it."""


class Failure(Enum):
    """Why a request ended without all its tokens; the edge turns it into a status."""

    UNKNOWN_MODEL = "unknown_model"
    TOO_LONG = "too_long"
    INVALID = "invalid"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline"
    POISON = "poison"
    RETRIES = "retries"
    CANCELLED = "cancelled"
    ENGINE = "engine"
    SUPERSEDED = "superseded"


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAccepted:
    """A valid request: opens a journal, or answers Failed at once when the bound on journal tokens is reached."""

    request: RequestId
    deployment: DeploymentId
    # Packed u32.
    prompt: bytes
    # Whose tokens these are.
    model_path: str = ""
    sampling: Sampling
    # One a choice, drawn or derived at the edge.
    seeds: tuple[int, ...]
    priority: int = 0
    tenant: str = ""
    tenant_salt: str = ""
    prefix_hashes: tuple[int, ...] = ()
    render: bytes = b""
    # Monotonic seconds.
    deadline: float


@dataclass(frozen=True, slots=True)
class ChoiceStopped:
    """Rendering found a stop string: the choice ends here, whatever its worker still computes."""

    request: RequestId
    choice: int


@dataclass(frozen=True, slots=True)
class ResumeAsked:
    """A client wants to go on with a stream that it began elsewhere, or lost. Answered by ShadowFound."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class ResumeDropped:
    """The client that asked is gone."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class ChoiceSeen:
    """What the client has of one choice: its first `tokens`, and its end or not."""

    tokens: int
    finished: bool


@dataclass(frozen=True, slots=True)
class StreamAdopted:
    """The journal of a found shadow, from now on ours: what the client has counts as delivered."""

    asked: RequestAccepted
    worker: WorkerKey
    node: NodeId
    shadow: Shadow
    # One a choice of the shadow, each with no more tokens than the shadow has.
    seen: tuple[ChoiceSeen, ...]


@dataclass(frozen=True, slots=True)
class ClientGone:
    request: RequestId


@dataclass(frozen=True, slots=True)
class ClientDrained:
    """The client's socket took everything, the finish included."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class LeaderOpened:
    """A session with a leader began: it has taken, or is about to take, the inventory of this very moment."""

    term: Term = Term(0)


@dataclass(frozen=True, slots=True)
class LeaderLost:
    pass


@dataclass(frozen=True, slots=True)
class LeaderSaid:
    body: RouteDown


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """Hellos were exchanged on a new stream."""

    worker: WorkerKey


@dataclass(frozen=True, slots=True)
class WorkerBroken:
    """The stream broke, or none could be made; its owner keeps trying. `heard` is when it last carried a frame."""

    worker: WorkerKey
    heard: float


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """The worker refuses connections, or greets and falls silent: its sequences are lost."""

    worker: WorkerKey
    reason: Reason


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    worker: WorkerKey
    body: ServeDown


@dataclass(frozen=True, slots=True)
class Tick:
    """Comes at least every reconnect_min seconds."""


Event = (
    RequestAccepted
    | ChoiceStopped
    | ResumeAsked
    | ResumeDropped
    | StreamAdopted
    | ClientGone
    | ClientDrained
    | LeaderOpened
    | LeaderLost
    | LeaderSaid
    | WorkerUp
    | WorkerBroken
    | WorkerGone
    | WorkerSaid
    | Tick
)

# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class AskRoute:
    entry: RouteEntry


@dataclass(frozen=True, slots=True)
class TellEnd:
    entry: EndEntry


@dataclass(frozen=True, slots=True)
class TellJournal:
    """The leader is to know that this gateway keeps the journal from now on."""

    info: JournalInfo


@dataclass(frozen=True, slots=True)
class TellFirstToken:
    token: FirstToken


@dataclass(frozen=True, slots=True)
class ShadowFound:
    """Where a stream's newest shadow is, in one piece; `shadow` is None if no worker holds one. `reason` says why, and
    `certain` is False if a worker could not be asked."""

    request: RequestId
    worker: WorkerKey
    node: NodeId
    shadow: Shadow | None
    reason: Reason
    certain: bool = True


@dataclass(frozen=True, slots=True)
class ConnectWorker:
    """Keep a stream to this worker from now on. Answered by WorkerUp, WorkerBroken or WorkerGone."""

    worker: WorkerKey
    node: NodeId


@dataclass(frozen=True, slots=True)
class DropWorker:
    """No replica and no journal needs the stream any more."""

    worker: WorkerKey


@dataclass(frozen=True, slots=True)
class SendWorker:
    """In order on the worker's stream; lost if that breaks, which WorkerBroken and the next Sync make good."""

    worker: WorkerKey
    body: OpenRequest | CancelSlots | EndRequests | SyncSlots | ResumeRequest


@dataclass(frozen=True, slots=True)
class Started:
    """A worker admitted the request."""

    request: RequestId
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tokens that are in the journal now and go to the client once: indices `first_index` and on."""

    request: RequestId
    choice: int
    first_index: int
    tokens: array[int]
    logprobs: tuple[TokenLogprobs, ...]
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The journal is closed; what was delivered stays delivered."""

    request: RequestId
    failure: Failure
    reason: Reason
    retry_ms: int = 0


@dataclass(frozen=True, slots=True)
class Moved:
    """The request goes on elsewhere under its next attempt."""

    request: RequestId
    attempt: int
    planned: bool
    reason: Reason


@dataclass(frozen=True, slots=True)
class Counted:
    """Something was dropped or refused as the protocol says."""

    name: str
    amount: int = 1


Effect = (
    AskRoute
    | TellEnd
    | TellJournal
    | TellFirstToken
    | ShadowFound
    | ConnectWorker
    | DropWorker
    | SendWorker
    | Started
    | Deliver
    | Failed
    | Moved
    | Counted
)
