from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReasonKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_KIND_UNSPECIFIED: _ClassVar[ReasonKind]
    REASON_KIND_PROCESS_EXITED: _ClassVar[ReasonKind]
    REASON_KIND_LEASE_EXPIRED: _ClassVar[ReasonKind]
    REASON_KIND_CONNECTION_REFUSED: _ClassVar[ReasonKind]
    REASON_KIND_SESSION_SILENT: _ClassVar[ReasonKind]
    REASON_KIND_NO_PROGRESS: _ClassVar[ReasonKind]
    REASON_KIND_DEVICE_SICK: _ClassVar[ReasonKind]
    REASON_KIND_OUT_OF_MEMORY: _ClassVar[ReasonKind]
    REASON_KIND_LOAD_FAILED: _ClassVar[ReasonKind]
    REASON_KIND_GROUP_FAILED: _ClassVar[ReasonKind]
    REASON_KIND_DEADLINE: _ClassVar[ReasonKind]
    REASON_KIND_DRAINING: _ClassVar[ReasonKind]
    REASON_KIND_OVERLOADED: _ClassVar[ReasonKind]
    REASON_KIND_NO_CAPACITY: _ClassVar[ReasonKind]
    REASON_KIND_STALE_TERM: _ClassVar[ReasonKind]
    REASON_KIND_STALE_EPOCH: _ClassVar[ReasonKind]
    REASON_KIND_SUPERSEDED: _ClassVar[ReasonKind]
    REASON_KIND_INVALID: _ClassVar[ReasonKind]
    REASON_KIND_CANCELLED: _ClassVar[ReasonKind]
    REASON_KIND_POISON: _ClassVar[ReasonKind]
    REASON_KIND_REPLACED: _ClassVar[ReasonKind]
    REASON_KIND_NOT_LEADER: _ClassVar[ReasonKind]
    REASON_KIND_CLIENT_GONE: _ClassVar[ReasonKind]
    REASON_KIND_RETRIES_EXHAUSTED: _ClassVar[ReasonKind]
    REASON_KIND_ADMIN: _ClassVar[ReasonKind]
    REASON_KIND_STORE_UNAVAILABLE: _ClassVar[ReasonKind]
    REASON_KIND_UNKNOWN_ID: _ClassVar[ReasonKind]
    REASON_KIND_ENGINE_FAULT: _ClassVar[ReasonKind]
    REASON_KIND_SLOW: _ClassVar[ReasonKind]

class PermitMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PERMIT_MODE_UNSPECIFIED: _ClassVar[PermitMode]
    PERMIT_MODE_LEADER: _ClassVar[PermitMode]
    PERMIT_MODE_LEADERLESS: _ClassVar[PermitMode]

class RankPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RANK_PHASE_UNSPECIFIED: _ClassVar[RankPhase]
    RANK_PHASE_STARTING: _ClassVar[RankPhase]
    RANK_PHASE_IDLE: _ClassVar[RankPhase]
    RANK_PHASE_FORMING: _ClassVar[RankPhase]
    RANK_PHASE_LOADING: _ClassVar[RankPhase]
    RANK_PHASE_SERVING: _ClassVar[RankPhase]
    RANK_PHASE_EXITED: _ClassVar[RankPhase]

class ReplicaPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_PHASE_UNSPECIFIED: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_PLANNED: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_PREPARING: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_FORMING: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_LOADING: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_READY: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_DRAINING: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_CLOSED: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_HELD: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_DEGRADED: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_FAILED: _ClassVar[ReplicaPhase]
REASON_KIND_UNSPECIFIED: ReasonKind
REASON_KIND_PROCESS_EXITED: ReasonKind
REASON_KIND_LEASE_EXPIRED: ReasonKind
REASON_KIND_CONNECTION_REFUSED: ReasonKind
REASON_KIND_SESSION_SILENT: ReasonKind
REASON_KIND_NO_PROGRESS: ReasonKind
REASON_KIND_DEVICE_SICK: ReasonKind
REASON_KIND_OUT_OF_MEMORY: ReasonKind
REASON_KIND_LOAD_FAILED: ReasonKind
REASON_KIND_GROUP_FAILED: ReasonKind
REASON_KIND_DEADLINE: ReasonKind
REASON_KIND_DRAINING: ReasonKind
REASON_KIND_OVERLOADED: ReasonKind
REASON_KIND_NO_CAPACITY: ReasonKind
REASON_KIND_STALE_TERM: ReasonKind
REASON_KIND_STALE_EPOCH: ReasonKind
REASON_KIND_SUPERSEDED: ReasonKind
REASON_KIND_INVALID: ReasonKind
REASON_KIND_CANCELLED: ReasonKind
REASON_KIND_POISON: ReasonKind
REASON_KIND_REPLACED: ReasonKind
REASON_KIND_NOT_LEADER: ReasonKind
REASON_KIND_CLIENT_GONE: ReasonKind
REASON_KIND_RETRIES_EXHAUSTED: ReasonKind
REASON_KIND_ADMIN: ReasonKind
REASON_KIND_STORE_UNAVAILABLE: ReasonKind
REASON_KIND_UNKNOWN_ID: ReasonKind
REASON_KIND_ENGINE_FAULT: ReasonKind
REASON_KIND_SLOW: ReasonKind
PERMIT_MODE_UNSPECIFIED: PermitMode
PERMIT_MODE_LEADER: PermitMode
PERMIT_MODE_LEADERLESS: PermitMode
RANK_PHASE_UNSPECIFIED: RankPhase
RANK_PHASE_STARTING: RankPhase
RANK_PHASE_IDLE: RankPhase
RANK_PHASE_FORMING: RankPhase
RANK_PHASE_LOADING: RankPhase
RANK_PHASE_SERVING: RankPhase
RANK_PHASE_EXITED: RankPhase
REPLICA_PHASE_UNSPECIFIED: ReplicaPhase
REPLICA_PHASE_PLANNED: ReplicaPhase
REPLICA_PHASE_PREPARING: ReplicaPhase
REPLICA_PHASE_FORMING: ReplicaPhase
REPLICA_PHASE_LOADING: ReplicaPhase
REPLICA_PHASE_READY: ReplicaPhase
REPLICA_PHASE_DRAINING: ReplicaPhase
REPLICA_PHASE_CLOSED: ReplicaPhase
REPLICA_PHASE_HELD: ReplicaPhase
REPLICA_PHASE_DEGRADED: ReplicaPhase
REPLICA_PHASE_FAILED: ReplicaPhase

class Head(_message.Message):
    __slots__ = ("term", "session", "seq", "ack")
    TERM_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    term: int
    session: int
    seq: int
    ack: int
    def __init__(self, term: _Optional[int] = ..., session: _Optional[int] = ..., seq: _Optional[int] = ..., ack: _Optional[int] = ...) -> None: ...

class Reason(_message.Message):
    __slots__ = ("kind", "text", "node", "rank", "group", "collective")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_FIELD_NUMBER: _ClassVar[int]
    kind: ReasonKind
    text: str
    node: str
    rank: int
    group: str
    collective: int
    def __init__(self, kind: _Optional[_Union[ReasonKind, str]] = ..., text: _Optional[str] = ..., node: _Optional[str] = ..., rank: _Optional[int] = ..., group: _Optional[str] = ..., collective: _Optional[int] = ...) -> None: ...

class Permit(_message.Message):
    __slots__ = ("request", "attempt", "replica", "epoch", "term", "mode", "solo", "priority")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SOLO_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    replica: str
    epoch: int
    term: int
    mode: PermitMode
    solo: bool
    priority: int
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ..., replica: _Optional[str] = ..., epoch: _Optional[int] = ..., term: _Optional[int] = ..., mode: _Optional[_Union[PermitMode, str]] = ..., solo: _Optional[bool] = ..., priority: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("id", "name", "memory_bytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    memory_bytes: int
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., memory_bytes: _Optional[int] = ...) -> None: ...

class TimingSpec(_message.Message):
    __slots__ = ("failure_timeout_ms", "heartbeat_interval_ms")
    FAILURE_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    failure_timeout_ms: int
    heartbeat_interval_ms: int
    def __init__(self, failure_timeout_ms: _Optional[int] = ..., heartbeat_interval_ms: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("rank", "node", "device", "host")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node: str
    device: str
    host: str
    def __init__(self, rank: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., host: _Optional[str] = ...) -> None: ...

class ParallelDegrees(_message.Message):
    __slots__ = ("tensor", "pipeline", "data", "expert")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    pipeline: int
    data: int
    expert: int
    def __init__(self, tensor: _Optional[int] = ..., pipeline: _Optional[int] = ..., data: _Optional[int] = ..., expert: _Optional[int] = ...) -> None: ...

class ReplicaSpec(_message.Message):
    __slots__ = ("deployment", "model_path", "dtype", "numerics", "load_format", "degrees", "backend", "trust_remote_code", "disable_cuda_graph", "mem_fraction_static", "block_tokens", "max_sequences", "max_batch_tokens", "max_model_tokens", "kv_cache_tokens", "cpu_threads", "enable_prefix_cache", "overlap", "kv_cache_dtype")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FORMAT_FIELD_NUMBER: _ClassVar[int]
    DEGREES_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TRUST_REMOTE_CODE_FIELD_NUMBER: _ClassVar[int]
    DISABLE_CUDA_GRAPH_FIELD_NUMBER: _ClassVar[int]
    MEM_FRACTION_STATIC_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CPU_THREADS_FIELD_NUMBER: _ClassVar[int]
    ENABLE_PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    model_path: str
    dtype: str
    numerics: str
    load_format: str
    degrees: ParallelDegrees
    backend: str
    trust_remote_code: bool
    disable_cuda_graph: bool
    mem_fraction_static: float
    block_tokens: int
    max_sequences: int
    max_batch_tokens: int
    max_model_tokens: int
    kv_cache_tokens: int
    cpu_threads: int
    enable_prefix_cache: bool
    overlap: str
    kv_cache_dtype: str
    def __init__(self, deployment: _Optional[str] = ..., model_path: _Optional[str] = ..., dtype: _Optional[str] = ..., numerics: _Optional[str] = ..., load_format: _Optional[str] = ..., degrees: _Optional[_Union[ParallelDegrees, _Mapping]] = ..., backend: _Optional[str] = ..., trust_remote_code: _Optional[bool] = ..., disable_cuda_graph: _Optional[bool] = ..., mem_fraction_static: _Optional[float] = ..., block_tokens: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_model_tokens: _Optional[int] = ..., kv_cache_tokens: _Optional[int] = ..., cpu_threads: _Optional[int] = ..., enable_prefix_cache: _Optional[bool] = ..., overlap: _Optional[str] = ..., kv_cache_dtype: _Optional[str] = ...) -> None: ...

class Capacity(_message.Message):
    __slots__ = ("total_blocks", "block_tokens", "max_sequences", "max_batch_tokens", "max_model_tokens", "fingerprint", "numerics", "attention")
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    total_blocks: int
    block_tokens: int
    max_sequences: int
    max_batch_tokens: int
    max_model_tokens: int
    fingerprint: str
    numerics: str
    attention: str
    def __init__(self, total_blocks: _Optional[int] = ..., block_tokens: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_model_tokens: _Optional[int] = ..., fingerprint: _Optional[str] = ..., numerics: _Optional[str] = ..., attention: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "max_tokens", "min_tokens", "ignore_eos", "stop_ids", "logit_bias", "logprobs", "prompt_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., stop_ids: _Optional[_Iterable[int]] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...
