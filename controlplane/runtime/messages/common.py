"""Records shared by every stream.

Mirrors protos/perdure/v1/common.proto field by field; wire.py checks that at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from controlplane.runtime.ids import Attempt, DeploymentId, Epoch, NodeId, ReplicaId, RequestId, SessionId, Term


class ReasonKind(IntEnum):
    PROCESS_EXITED = 1
    LEASE_EXPIRED = 2
    CONNECTION_REFUSED = 3
    SESSION_SILENT = 4
    NO_PROGRESS = 5
    DEVICE_SICK = 6
    OUT_OF_MEMORY = 7
    LOAD_FAILED = 8
    GROUP_FAILED = 9
    DEADLINE = 10
    DRAINING = 11
    OVERLOADED = 12
    NO_CAPACITY = 13
    STALE_TERM = 14
    STALE_EPOCH = 15
    SUPERSEDED = 16
    INVALID = 17
    CANCELLED = 18
    POISON = 19
    REPLACED = 20
    NOT_LEADER = 21
    CLIENT_GONE = 22
    RETRIES_EXHAUSTED = 23
    ADMIN = 24
    STORE_UNAVAILABLE = 25
    UNKNOWN_ID = 26
    # The engine's own error in a step; the device is well.
    ENGINE_FAULT = 27
    SLOW = 28


class PermitMode(IntEnum):
    LEADER = 1
    # Minted by a gateway whose leader and etcd are both gone; the worker admits it only without a live leader.
    LEADERLESS = 2


class RankPhase(IntEnum):
    STARTING = 1
    IDLE = 2
    FORMING = 3
    LOADING = 4
    SERVING = 5
    EXITED = 6


class ReplicaPhase(IntEnum):
    PLANNED = 1
    PREPARING = 2
    FORMING = 3
    LOADING = 4
    READY = 5
    DRAINING = 6
    CLOSED = 7
    HELD = 8
    DEGRADED = 9
    FAILED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Stands at the head of every frame of a session between a peer and the leader."""

    # Term under which the sender believes the session runs. A frame below the receiver's highest term is refused.
    term: Term
    # Minted by the leader; the newest of an incarnation wins. Zero only in a Hello.
    session: SessionId
    # Counts the sender's frames in this session, from 1.
    seq: int
    # Highest seq received from the other side.
    ack: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why something was refused, closed, moved or killed. The same record reaches logs, status and tests."""

    kind: ReasonKind
    text: str = ""
    node: NodeId = NodeId("")
    rank: int | None = None
    group: str = ""
    collective: int | None = None


SOLO_TOKENS = 4
"""Tokens after which a suspect is acquitted: what made its last engine die would have done it again by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """The leader's leave to run one attempt of a request on one replica epoch. Travels with the request's body."""

    request: RequestId
    attempt: Attempt
    replica: ReplicaId
    epoch: Epoch
    term: Term
    mode: PermitMode = PermitMode.LEADER
    # Run with nothing else in the step for its first SOLO_TOKENS tokens: it is suspected of having killed its last
    # engine.
    solo: bool = False
    # Higher runs first.
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device a rank can be bound to: "cpu:0", "cuda:3"."""

    id: str
    name: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingSpec:
    """Times every party derives its own from (timing.py)."""

    failure_timeout_ms: int
    heartbeat_interval_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One rank of a replica: where it runs. `rank` counts from 0 within the replica, tensor axis fastest."""

    rank: int
    node: NodeId
    device: str
    # Host part for the process group's rendezvous.
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelDegrees:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What every rank of a replica must agree on before it loads."""

    deployment: DeploymentId
    model_path: str
    # "auto", "float32", "bfloat16", "float16".
    dtype: str = "auto"
    # "exact" (batch-invariant execution), "fast", or "auto": exact where that costs nothing (on CPUs).
    numerics: str = "auto"
    # "auto" or "dummy" (random weights from the config).
    load_format: str = "auto"
    degrees: ParallelDegrees = ParallelDegrees()
    # "auto", "nccl" or "gloo".
    backend: str = "auto"
    trust_remote_code: bool = False
    disable_cuda_graph: bool = False
    # Share of the device's memory the engine may take, weights included.
    mem_fraction_static: float = 0.85
    block_tokens: int = 16
    max_sequences: int = 64
    max_batch_tokens: int = 2048
    # 0: the model's own limit.
    max_model_tokens: int = 0
    # 0: sized by mem_fraction_static.
    kv_cache_tokens: int = 0
    # A CPU rank's share of the cores; 0: the host's cores divided by the ranks of all its nodes.
    cpu_threads: int = 0
    enable_prefix_cache: bool = True
    # Whether the next step is prepared while one runs: "auto" (on GPUs), "on" or "off".
    overlap: str = "auto"
    # What keys and values are cached as: "auto" (the model's own type) or "fp8_e4m3".
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a loaded replica can hold."""

    total_blocks: int
    block_tokens: int
    max_sequences: int
    max_batch_tokens: int
    max_model_tokens: int
    # Seeds its prefix hashes, together with the tenant's salt; the same for replicas that could share blocks.
    fingerprint: str = ""
    # What holds for its text, in words.
    numerics: str = ""
    # What it attends with, in words.
    attention: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters as the engine takes them. See dataplane/engine/sampler.py for their order of application."""

    temperature: float = 1.0
    top_p: float = 1.0
    # 0: off.
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # 1: off.
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    # Number of alternatives reported beside the chosen token; absent: no logprobs.
    logprobs: int | None = None
    # The same for the prompt's tokens.
    prompt_logprobs: int | None = None
