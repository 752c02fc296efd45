from protos.perdure.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class OpenCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPEN_CODE_UNSPECIFIED: _ClassVar[OpenCode]
    OPEN_CODE_STALE_TERM: _ClassVar[OpenCode]
    OPEN_CODE_STALE_EPOCH: _ClassVar[OpenCode]
    OPEN_CODE_FULL: _ClassVar[OpenCode]
    OPEN_CODE_DRAINING: _ClassVar[OpenCode]
    OPEN_CODE_TOO_LONG: _ClassVar[OpenCode]
    OPEN_CODE_DUPLICATE: _ClassVar[OpenCode]
    OPEN_CODE_INVALID: _ClassVar[OpenCode]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason
OPEN_CODE_UNSPECIFIED: OpenCode
OPEN_CODE_STALE_TERM: OpenCode
OPEN_CODE_STALE_EPOCH: OpenCode
OPEN_CODE_FULL: OpenCode
OPEN_CODE_DRAINING: OpenCode
OPEN_CODE_TOO_LONG: OpenCode
OPEN_CODE_DUPLICATE: OpenCode
OPEN_CODE_INVALID: OpenCode

class ServeRequest(_message.Message):
    __slots__ = ("hello", "sync", "open", "cancel", "end", "resume")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    hello: ServeHello
    sync: SyncSlots
    open: OpenRequest
    cancel: CancelSlots
    end: EndRequests
    resume: ResumeRequest
    def __init__(self, hello: _Optional[_Union[ServeHello, _Mapping]] = ..., sync: _Optional[_Union[SyncSlots, _Mapping]] = ..., open: _Optional[_Union[OpenRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelSlots, _Mapping]] = ..., end: _Optional[_Union[EndRequests, _Mapping]] = ..., resume: _Optional[_Union[ResumeRequest, _Mapping]] = ...) -> None: ...

class ServeHello(_message.Message):
    __slots__ = ("cluster", "name", "incarnation", "highest_term_seen", "leader_address", "heartbeat_interval_ms")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_TERM_SEEN_FIELD_NUMBER: _ClassVar[int]
    LEADER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    name: str
    incarnation: str
    highest_term_seen: int
    leader_address: str
    heartbeat_interval_ms: int
    def __init__(self, cluster: _Optional[str] = ..., name: _Optional[str] = ..., incarnation: _Optional[str] = ..., highest_term_seen: _Optional[int] = ..., leader_address: _Optional[str] = ..., heartbeat_interval_ms: _Optional[int] = ...) -> None: ...

class SlotCursor(_message.Message):
    __slots__ = ("slot", "request", "choice", "attempt", "next_index")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    slot: int
    request: str
    choice: int
    attempt: int
    next_index: int
    def __init__(self, slot: _Optional[int] = ..., request: _Optional[str] = ..., choice: _Optional[int] = ..., attempt: _Optional[int] = ..., next_index: _Optional[int] = ...) -> None: ...

class SyncSlots(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[SlotCursor]
    def __init__(self, slots: _Optional[_Iterable[_Union[SlotCursor, _Mapping]]] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("index", "slot", "seed", "delivered", "finished")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    index: int
    slot: int
    seed: int
    delivered: bytes
    finished: bool
    def __init__(self, index: _Optional[int] = ..., slot: _Optional[int] = ..., seed: _Optional[int] = ..., delivered: _Optional[bytes] = ..., finished: _Optional[bool] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("permit", "choices", "prompt", "sampling", "tenant_salt", "render", "resumable", "remaining_ms", "allow_cached")
    PERMIT_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TENANT_SALT_FIELD_NUMBER: _ClassVar[int]
    RENDER_FIELD_NUMBER: _ClassVar[int]
    RESUMABLE_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_CACHED_FIELD_NUMBER: _ClassVar[int]
    permit: _common_pb2.Permit
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    prompt: bytes
    sampling: _common_pb2.Sampling
    tenant_salt: str
    render: bytes
    resumable: bool
    remaining_ms: int
    allow_cached: bool
    def __init__(self, permit: _Optional[_Union[_common_pb2.Permit, _Mapping]] = ..., choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., prompt: _Optional[bytes] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., tenant_salt: _Optional[str] = ..., render: _Optional[bytes] = ..., resumable: _Optional[bool] = ..., remaining_ms: _Optional[int] = ..., allow_cached: _Optional[bool] = ...) -> None: ...

class CancelSlots(_message.Message):
    __slots__ = ("slots", "reason")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    reason: _common_pb2.Reason
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class EndRequests(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, requests: _Optional[_Iterable[str]] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("request", "counts")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    request: str
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request: _Optional[str] = ..., counts: _Optional[_Iterable[int]] = ...) -> None: ...

class ServeResponse(_message.Message):
    __slots__ = ("hello", "step", "admitted", "refused", "sync", "lost", "draining", "superseded", "shadow", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDED_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: ServeHello
    step: StepTokens
    admitted: Admitted
    refused: OpenRefused
    sync: SyncReply
    lost: SlotsLost
    draining: WorkerDraining
    superseded: Superseded
    shadow: Shadow
    heartbeat: ServeHeartbeat
    def __init__(self, hello: _Optional[_Union[ServeHello, _Mapping]] = ..., step: _Optional[_Union[StepTokens, _Mapping]] = ..., admitted: _Optional[_Union[Admitted, _Mapping]] = ..., refused: _Optional[_Union[OpenRefused, _Mapping]] = ..., sync: _Optional[_Union[SyncReply, _Mapping]] = ..., lost: _Optional[_Union[SlotsLost, _Mapping]] = ..., draining: _Optional[_Union[WorkerDraining, _Mapping]] = ..., superseded: _Optional[_Union[Superseded, _Mapping]] = ..., shadow: _Optional[_Union[Shadow, _Mapping]] = ..., heartbeat: _Optional[_Union[ServeHeartbeat, _Mapping]] = ...) -> None: ...

class ServeHeartbeat(_message.Message):
    __slots__ = ("highest_term_seen", "leader_address")
    HIGHEST_TERM_SEEN_FIELD_NUMBER: _ClassVar[int]
    LEADER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    highest_term_seen: int
    leader_address: str
    def __init__(self, highest_term_seen: _Optional[int] = ..., leader_address: _Optional[str] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("slot", "reason", "stop_id", "error")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    slot: int
    reason: FinishReason
    stop_id: int
    error: _common_pb2.Reason
    def __init__(self, slot: _Optional[int] = ..., reason: _Optional[_Union[FinishReason, str]] = ..., stop_id: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("slot", "index", "chosen", "chosen_rank", "top_ids", "top_values", "prompt")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_VALUES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    index: int
    chosen: float
    chosen_rank: int
    top_ids: bytes
    top_values: bytes
    prompt: bool
    def __init__(self, slot: _Optional[int] = ..., index: _Optional[int] = ..., chosen: _Optional[float] = ..., chosen_rank: _Optional[int] = ..., top_ids: _Optional[bytes] = ..., top_values: _Optional[bytes] = ..., prompt: _Optional[bool] = ...) -> None: ...

class StepTokens(_message.Message):
    __slots__ = ("slots", "first_index", "counts", "tokens", "logprobs", "finish")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    slots: bytes
    first_index: bytes
    counts: bytes
    tokens: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    finish: _containers.RepeatedCompositeFieldContainer[Finish]
    def __init__(self, slots: _Optional[bytes] = ..., first_index: _Optional[bytes] = ..., counts: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., finish: _Optional[_Iterable[_Union[Finish, _Mapping]]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("request", "attempt", "cached_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    cached_tokens: int
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class OpenRefused(_message.Message):
    __slots__ = ("request", "attempt", "code", "reason")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    code: OpenCode
    reason: _common_pb2.Reason
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ..., code: _Optional[_Union[OpenCode, str]] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class SyncReply(_message.Message):
    __slots__ = ("known", "unknown")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    known: _containers.RepeatedScalarFieldContainer[int]
    unknown: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, known: _Optional[_Iterable[int]] = ..., unknown: _Optional[_Iterable[int]] = ...) -> None: ...

class SlotsLost(_message.Message):
    __slots__ = ("slots", "reason", "suspect")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    reason: _common_pb2.Reason
    suspect: bool
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., suspect: _Optional[bool] = ...) -> None: ...

class WorkerDraining(_message.Message):
    __slots__ = ("deadline_ms",)
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    def __init__(self, deadline_ms: _Optional[int] = ...) -> None: ...

class Superseded(_message.Message):
    __slots__ = ("request", "attempt")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Shadow(_message.Message):
    __slots__ = ("request", "attempt", "prompt", "choices", "sampling", "render", "last", "missing", "permit", "remaining_ms", "cached_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    RENDER_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    PERMIT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    prompt: bytes
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    sampling: _common_pb2.Sampling
    render: bytes
    last: bool
    missing: bool
    permit: _common_pb2.Permit
    remaining_ms: int
    cached_tokens: int
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt: _Optional[bytes] = ..., choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., render: _Optional[bytes] = ..., last: _Optional[bool] = ..., missing: _Optional[bool] = ..., permit: _Optional[_Union[_common_pb2.Permit, _Mapping]] = ..., remaining_ms: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...
