"""Frames between a worker daemon and a rank process, over a Unix stream socket.

Each frame is a 4-byte little-endian length, then a msgspec MessagePack array whose first item is the
frame's tag. The daemon owns ids (`SequenceId` is its own small number for one choice of one attempt of a request and
is never reused in a rank's life); the rank knows neither gateways nor slots. Only the driver (rank 0 of its
replica) is sent sequences; its peers get their work from it over the process group.
"""

from __future__ import annotations

from typing import NewType

import msgspec

from controlplane.runtime.ids import Epoch, ReplicaId
from controlplane.runtime.messages.common import Capacity, Member, Reason, ReplicaSpec, Sampling
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.messages.weights import HeldWeights, WeightSource

SequenceId = NewType("SequenceId", int)

LENGTH_BYTES = 4
FRAME_BYTES_MAX = 256 * 1024 * 1024


class Frame(msgspec.Struct, frozen=True, array_like=True, tag_field="type"):
    """Base of all frames."""


# ---------------------------------------------------------------- daemon → rank


class Prepare(Frame, frozen=True, tag=True):
    """Belong to this replica epoch from now on. Answered by `Prepared`.

    Any older epoch's sequences and group are dropped; weights that still fit are kept.
    """

    replica: ReplicaId
    epoch: Epoch
    rank: int
    members: tuple[Member, ...]
    nonce: str
    spec: ReplicaSpec
    collective_timeout_ms: int


class Form(Frame, frozen=True, tag=True):
    """Form the process group at `rendezvous` (host:port; rank 0 listens there). Answered by `Formed`."""

    epoch: Epoch
    rendezvous: str
    deadline_ms: int


class Load(Frame, frozen=True, tag=True):
    """Load weights, size the KV cache, warm up. Answered by `LoadProgress`s, then `Loaded`."""

    epoch: Epoch
    # Ranks that hold weights of the same model.
    sources: tuple[WeightSource, ...] = ()


class Preload(Frame, frozen=True, tag=True):
    """Load the shard of rank `rank` of a replica of `spec` ahead of need; for a rank that no epoch has. Answered by
    `Holds`. Any frame that follows interrupts it, unanswered; an epoch of the same shard goes on from there."""

    rank: int
    spec: ReplicaSpec
    # Where other ranks reach this one.
    host: str
    sources: tuple[WeightSource, ...] = ()


class Submission(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to run: `prompt` then `delivered` are its tokens so far (packed u32); generation goes on at index
    len(delivered). `sampling.seed` is the choice's own."""

    sequence: SequenceId
    prompt: bytes
    delivered: bytes
    sampling: Sampling
    priority: int
    cache_salt: str
    allow_cached: bool
    solo: bool
    # Sequences of one group share a prompt (n > 1) and may share its blocks.
    group: int


class Submit(Frame, frozen=True, tag=True):
    sequences: tuple[Submission, ...]


class Cancel(Frame, frozen=True, tag=True):
    sequences: tuple[SequenceId, ...]


class Abort(Frame, frozen=True, tag=True):
    """End the epoch: drop its sequences and its group, keep process and weights. Answered by `Aborted`. The
    daemon also moves the abort word of the shared progress page, which a rank stuck in a collective watches."""

    epoch: Epoch


class Exit(Frame, frozen=True, tag=True):
    """Leave at once, in order."""


DaemonFrame = Prepare | Form | Load | Preload | Submit | Cancel | Abort | Exit


# ---------------------------------------------------------------- rank → daemon


class Hello(Frame, frozen=True, tag=True):
    """First frame of a rank."""

    pid: int
    device: str


class Prepared(Frame, frozen=True, tag=True):
    epoch: Epoch
    # Rank 0: host:port it listens on for the group's rendezvous; others: "".
    rendezvous: str
    # Fingerprint of the weights it holds already; "" for none.
    weights: str


class Formed(Frame, frozen=True, tag=True):
    epoch: Epoch


class LoadProgress(Frame, frozen=True, tag=True):
    epoch: Epoch
    stage: str
    # 0 to 1 over the whole load.
    fraction: float


class Loaded(Frame, frozen=True, tag=True):
    epoch: Epoch
    capacity: Capacity
    weights: str


class Holds(Frame, frozen=True, tag=True):
    """What the rank holds has changed (None: nothing is left), or a preload failed (then with its reason)."""

    held: HeldWeights | None
    reason: Reason | None = None


class StepBegun(Frame, frozen=True, tag=True):
    """Driver only, before the step runs: whom to suspect if it never ends."""

    epoch: Epoch
    step: int
    # Packed u32 SequenceIds.
    sequences: bytes


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of one token; see TokenLogprobs in serve.proto."""

    sequence: SequenceId
    index: int
    chosen: float
    chosen_rank: int
    top_ids: bytes
    top_values: bytes
    prompt: bool


class Finished(msgspec.Struct, frozen=True, array_like=True):
    sequence: SequenceId
    reason: FinishReason
    stop_id: int | None = None
    error: Reason | None = None


class StepDone(Frame, frozen=True, tag=True):
    """Driver only: what one step gave. Columns as in StepTokens of serve.proto, with SequenceIds for slots.

    A sequence that cannot run (too long, invalid parameters) ends here with FinishReason.ERROR and no tokens.
    """

    epoch: Epoch
    step: int
    sequences: bytes
    first_index: bytes
    counts: bytes
    tokens: bytes
    logprobs: tuple[Logprobs, ...]
    finished: tuple[Finished, ...]


class AdmittedSequence(msgspec.Struct, frozen=True, array_like=True):
    sequence: SequenceId
    # Prompt tokens found in the prefix cache when it was first scheduled.
    cached_tokens: int


class LoadReport(Frame, frozen=True, tag=True):
    """Driver only, after a step that changed it, at most every 20 ms."""

    epoch: Epoch
    free_blocks: int
    running: int
    waiting: int
    waiting_tokens: int
    step_ms: float
    # (priority, count, tokens) of the waiting sequences.
    queue: tuple[tuple[int, int, int], ...]
    # Newest prefix block hashes, 64 bits each, little-endian; at most 4 KiB.
    prefix_digest: bytes
    admitted: tuple[AdmittedSequence, ...]


class GroupCost(msgspec.Struct, frozen=True, array_like=True):
    """What one kind of exchange has cost a rank in one of its groups."""

    # "control", "tensor", "pipeline", …, and the exchange: "all_reduce", "send", ….
    group: str
    kind: str
    calls: int
    bytes: int
    # Waiting for peers included; waiting for the next step's plan is not.
    seconds: float


class GroupCosts(Frame, frozen=True, tag=True):
    """What exchanges have cost since the last such frame, about once a second while the rank works."""

    epoch: Epoch
    costs: tuple[GroupCost, ...]


class Aborted(Frame, frozen=True, tag=True):
    epoch: Epoch


class Failed(Frame, frozen=True, tag=True):
    """The rank could not do what `during` names ("prepare", "form", "load", "step"); it is idle again and keeps its
    process. After a failed step the daemon ends the epoch."""

    epoch: Epoch
    during: str
    reason: Reason


RankFrame = (
    Hello
    | Prepared
    | Formed
    | LoadProgress
    | Loaded
    | Holds
    | StepBegun
    | StepDone
    | LoadReport
    | GroupCosts
    | Aborted
    | Failed
)


_encoder = msgspec.msgpack.Encoder()
_daemon_decoder = msgspec.msgpack.Decoder(DaemonFrame)
_rank_decoder = msgspec.msgpack.Decoder(RankFrame)


def encode(frame: Frame) -> bytes:
    """The frame with its length in front."""
    body = _encoder.encode(frame)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def decode_daemon_frame(body: bytes | memoryview) -> DaemonFrame:
    """A frame that a daemon sent, without its length. Raises msgspec.DecodeError."""
    return _daemon_decoder.decode(body)


def decode_rank_frame(body: bytes | memoryview) -> RankFrame:
    """A frame that a rank sent, without its length. Raises msgspec.DecodeError."""
    return _rank_decoder.decode(body)
