from protos.perdure.v1 import common_pb2 as _common_pb2
from protos.perdure.v1 import session_pb2 as _session_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JournalPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOURNAL_PHASE_UNSPECIFIED: _ClassVar[JournalPhase]
    JOURNAL_PHASE_ROUTING: _ClassVar[JournalPhase]
    JOURNAL_PHASE_OPENING: _ClassVar[JournalPhase]
    JOURNAL_PHASE_RUNNING: _ClassVar[JournalPhase]
    JOURNAL_PHASE_SYNCING: _ClassVar[JournalPhase]
    JOURNAL_PHASE_DRAINING_CLIENT: _ClassVar[JournalPhase]

class RouteCause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTE_CAUSE_UNSPECIFIED: _ClassVar[RouteCause]
    ROUTE_CAUSE_NEW: _ClassVar[RouteCause]
    ROUTE_CAUSE_LOST: _ClassVar[RouteCause]
    ROUTE_CAUSE_UNREACHABLE: _ClassVar[RouteCause]
    ROUTE_CAUSE_PLANNED: _ClassVar[RouteCause]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_FINISHED: _ClassVar[Outcome]
    OUTCOME_CANCELLED: _ClassVar[Outcome]
    OUTCOME_FAILED: _ClassVar[Outcome]

class RouteCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTE_CODE_UNSPECIFIED: _ClassVar[RouteCode]
    ROUTE_CODE_OVERLOADED: _ClassVar[RouteCode]
    ROUTE_CODE_NO_REPLICA: _ClassVar[RouteCode]
    ROUTE_CODE_UNKNOWN_DEPLOYMENT: _ClassVar[RouteCode]
    ROUTE_CODE_TOO_LONG: _ClassVar[RouteCode]
    ROUTE_CODE_DEADLINE: _ClassVar[RouteCode]
    ROUTE_CODE_POISON: _ClassVar[RouteCode]
    ROUTE_CODE_DEPLOYMENT_FAILED: _ClassVar[RouteCode]
    ROUTE_CODE_STALE_ATTEMPT: _ClassVar[RouteCode]
JOURNAL_PHASE_UNSPECIFIED: JournalPhase
JOURNAL_PHASE_ROUTING: JournalPhase
JOURNAL_PHASE_OPENING: JournalPhase
JOURNAL_PHASE_RUNNING: JournalPhase
JOURNAL_PHASE_SYNCING: JournalPhase
JOURNAL_PHASE_DRAINING_CLIENT: JournalPhase
ROUTE_CAUSE_UNSPECIFIED: RouteCause
ROUTE_CAUSE_NEW: RouteCause
ROUTE_CAUSE_LOST: RouteCause
ROUTE_CAUSE_UNREACHABLE: RouteCause
ROUTE_CAUSE_PLANNED: RouteCause
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_FINISHED: Outcome
OUTCOME_CANCELLED: Outcome
OUTCOME_FAILED: Outcome
ROUTE_CODE_UNSPECIFIED: RouteCode
ROUTE_CODE_OVERLOADED: RouteCode
ROUTE_CODE_NO_REPLICA: RouteCode
ROUTE_CODE_UNKNOWN_DEPLOYMENT: RouteCode
ROUTE_CODE_TOO_LONG: RouteCode
ROUTE_CODE_DEADLINE: RouteCode
ROUTE_CODE_POISON: RouteCode
ROUTE_CODE_DEPLOYMENT_FAILED: RouteCode
ROUTE_CODE_STALE_ATTEMPT: RouteCode

class RouteRequest(_message.Message):
    __slots__ = ("head", "hello", "inventory", "route", "end", "locate", "heartbeat", "fenced", "first_tokens")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    LOCATE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    head: _common_pb2.Head
    hello: GatewayHello
    inventory: Inventory
    route: RouteBatch
    end: EndBatch
    locate: Locate
    heartbeat: GatewayHeartbeat
    fenced: _session_pb2.Fenced
    first_tokens: FirstTokens
    def __init__(self, head: _Optional[_Union[_common_pb2.Head, _Mapping]] = ..., hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., inventory: _Optional[_Union[Inventory, _Mapping]] = ..., route: _Optional[_Union[RouteBatch, _Mapping]] = ..., end: _Optional[_Union[EndBatch, _Mapping]] = ..., locate: _Optional[_Union[Locate, _Mapping]] = ..., heartbeat: _Optional[_Union[GatewayHeartbeat, _Mapping]] = ..., fenced: _Optional[_Union[_session_pb2.Fenced, _Mapping]] = ..., first_tokens: _Optional[_Union[FirstTokens, _Mapping]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("cluster", "gateway", "incarnation", "url", "highest_term_seen", "pid", "host")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_TERM_SEEN_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    gateway: str
    incarnation: str
    url: str
    highest_term_seen: int
    pid: int
    host: str
    def __init__(self, cluster: _Optional[str] = ..., gateway: _Optional[str] = ..., incarnation: _Optional[str] = ..., url: _Optional[str] = ..., highest_term_seen: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...

class GatewayHeartbeat(_message.Message):
    __slots__ = ("open_requests", "journal_tokens", "loop_lag_ms")
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOOP_LAG_MS_FIELD_NUMBER: _ClassVar[int]
    open_requests: int
    journal_tokens: int
    loop_lag_ms: int
    def __init__(self, open_requests: _Optional[int] = ..., journal_tokens: _Optional[int] = ..., loop_lag_ms: _Optional[int] = ...) -> None: ...

class Inventory(_message.Message):
    __slots__ = ("journals", "last")
    JOURNALS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    journals: _containers.RepeatedCompositeFieldContainer[JournalInfo]
    last: bool
    def __init__(self, journals: _Optional[_Iterable[_Union[JournalInfo, _Mapping]]] = ..., last: _Optional[bool] = ...) -> None: ...

class JournalInfo(_message.Message):
    __slots__ = ("phase", "replica", "epoch", "entry")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    phase: JournalPhase
    replica: str
    epoch: int
    entry: RouteEntry
    def __init__(self, phase: _Optional[_Union[JournalPhase, str]] = ..., replica: _Optional[str] = ..., epoch: _Optional[int] = ..., entry: _Optional[_Union[RouteEntry, _Mapping]] = ...) -> None: ...

class ReplicaEpoch(_message.Message):
    __slots__ = ("replica", "epoch")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class RouteEntry(_message.Message):
    __slots__ = ("request", "attempt", "deployment", "cause", "prompt_tokens", "delivered_tokens", "max_tokens", "n", "priority", "tenant", "waited_ms", "remaining_ms", "prefix_hashes", "exclude", "crashes", "model_path")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WAITED_MS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASHES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    CRASHES_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    deployment: str
    cause: RouteCause
    prompt_tokens: int
    delivered_tokens: int
    max_tokens: int
    n: int
    priority: int
    tenant: str
    waited_ms: int
    remaining_ms: int
    prefix_hashes: _containers.RepeatedScalarFieldContainer[int]
    exclude: _containers.RepeatedCompositeFieldContainer[ReplicaEpoch]
    crashes: int
    model_path: str
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ..., deployment: _Optional[str] = ..., cause: _Optional[_Union[RouteCause, str]] = ..., prompt_tokens: _Optional[int] = ..., delivered_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., n: _Optional[int] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., waited_ms: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., prefix_hashes: _Optional[_Iterable[int]] = ..., exclude: _Optional[_Iterable[_Union[ReplicaEpoch, _Mapping]]] = ..., crashes: _Optional[int] = ..., model_path: _Optional[str] = ...) -> None: ...

class RouteBatch(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[RouteEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[RouteEntry, _Mapping]]] = ...) -> None: ...

class EndEntry(_message.Message):
    __slots__ = ("request", "attempt", "outcome", "tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    outcome: Outcome
    tokens: int
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., tokens: _Optional[int] = ...) -> None: ...

class EndBatch(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[EndEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[EndEntry, _Mapping]]] = ...) -> None: ...

class Locate(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: str
    def __init__(self, request: _Optional[str] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("request", "attempt", "gap_ms")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GAP_MS_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    gap_ms: int
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ..., gap_ms: _Optional[int] = ...) -> None: ...

class FirstTokens(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[FirstToken]
    def __init__(self, entries: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("head", "welcome", "refused", "replicas", "routed", "closed", "move", "cancel", "located", "heartbeat")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    LOCATED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    head: _common_pb2.Head
    welcome: GatewayWelcome
    refused: _session_pb2.SessionRefused
    replicas: ReplicaTable
    routed: RoutedBatch
    closed: ReplicaClosed
    move: MoveRequests
    cancel: CancelRequest
    located: Located
    heartbeat: LeaderHeartbeat
    def __init__(self, head: _Optional[_Union[_common_pb2.Head, _Mapping]] = ..., welcome: _Optional[_Union[GatewayWelcome, _Mapping]] = ..., refused: _Optional[_Union[_session_pb2.SessionRefused, _Mapping]] = ..., replicas: _Optional[_Union[ReplicaTable, _Mapping]] = ..., routed: _Optional[_Union[RoutedBatch, _Mapping]] = ..., closed: _Optional[_Union[ReplicaClosed, _Mapping]] = ..., move: _Optional[_Union[MoveRequests, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., located: _Optional[_Union[Located, _Mapping]] = ..., heartbeat: _Optional[_Union[LeaderHeartbeat, _Mapping]] = ...) -> None: ...

class GatewayWelcome(_message.Message):
    __slots__ = ("term", "session", "timing", "leader")
    TERM_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    term: int
    session: int
    timing: _common_pb2.TimingSpec
    leader: str
    def __init__(self, term: _Optional[int] = ..., session: _Optional[int] = ..., timing: _Optional[_Union[_common_pb2.TimingSpec, _Mapping]] = ..., leader: _Optional[str] = ...) -> None: ...

class LeaderHeartbeat(_message.Message):
    __slots__ = ("frozen", "workers_unheard")
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    WORKERS_UNHEARD_FIELD_NUMBER: _ClassVar[int]
    frozen: bool
    workers_unheard: bool
    def __init__(self, frozen: _Optional[bool] = ..., workers_unheard: _Optional[bool] = ...) -> None: ...

class ReplicaRow(_message.Message):
    __slots__ = ("replica", "epoch", "phase", "node", "serve_address", "deployment", "capacity", "model_path", "model", "numerics", "max_retries", "outdated")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SERVE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    MAX_RETRIES_FIELD_NUMBER: _ClassVar[int]
    OUTDATED_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    phase: _common_pb2.ReplicaPhase
    node: str
    serve_address: str
    deployment: str
    capacity: _common_pb2.Capacity
    model_path: str
    model: str
    numerics: str
    max_retries: int
    outdated: bool
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., phase: _Optional[_Union[_common_pb2.ReplicaPhase, str]] = ..., node: _Optional[str] = ..., serve_address: _Optional[str] = ..., deployment: _Optional[str] = ..., capacity: _Optional[_Union[_common_pb2.Capacity, _Mapping]] = ..., model_path: _Optional[str] = ..., model: _Optional[str] = ..., numerics: _Optional[str] = ..., max_retries: _Optional[int] = ..., outdated: _Optional[bool] = ...) -> None: ...

class ReplicaTable(_message.Message):
    __slots__ = ("full", "rows", "workers")
    FULL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    full: bool
    rows: _containers.RepeatedCompositeFieldContainer[ReplicaRow]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerRow]
    def __init__(self, full: _Optional[bool] = ..., rows: _Optional[_Iterable[_Union[ReplicaRow, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerRow, _Mapping]]] = ...) -> None: ...

class WorkerRow(_message.Message):
    __slots__ = ("node", "serve_address", "gone")
    NODE_FIELD_NUMBER: _ClassVar[int]
    SERVE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    node: str
    serve_address: str
    gone: bool
    def __init__(self, node: _Optional[str] = ..., serve_address: _Optional[str] = ..., gone: _Optional[bool] = ...) -> None: ...

class Routed(_message.Message):
    __slots__ = ("permit", "serve_address", "node")
    PERMIT_FIELD_NUMBER: _ClassVar[int]
    SERVE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    permit: _common_pb2.Permit
    serve_address: str
    node: str
    def __init__(self, permit: _Optional[_Union[_common_pb2.Permit, _Mapping]] = ..., serve_address: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class RouteRefused(_message.Message):
    __slots__ = ("request", "attempt", "code", "reason", "retry_ms", "newest_attempt")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_MS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request: str
    attempt: int
    code: RouteCode
    reason: _common_pb2.Reason
    retry_ms: int
    newest_attempt: int
    def __init__(self, request: _Optional[str] = ..., attempt: _Optional[int] = ..., code: _Optional[_Union[RouteCode, str]] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., retry_ms: _Optional[int] = ..., newest_attempt: _Optional[int] = ...) -> None: ...

class RoutedBatch(_message.Message):
    __slots__ = ("routed", "refused")
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    routed: _containers.RepeatedCompositeFieldContainer[Routed]
    refused: _containers.RepeatedCompositeFieldContainer[RouteRefused]
    def __init__(self, routed: _Optional[_Iterable[_Union[Routed, _Mapping]]] = ..., refused: _Optional[_Iterable[_Union[RouteRefused, _Mapping]]] = ...) -> None: ...

class ReplicaClosed(_message.Message):
    __slots__ = ("replica", "epoch", "reason", "suspects")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SUSPECTS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    reason: _common_pb2.Reason
    suspects: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., suspects: _Optional[_Iterable[str]] = ...) -> None: ...

class MoveRequests(_message.Message):
    __slots__ = ("replica", "epoch", "requests", "deadline_ms", "reason")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    requests: _containers.RepeatedScalarFieldContainer[str]
    deadline_ms: int
    reason: _common_pb2.Reason
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., requests: _Optional[_Iterable[str]] = ..., deadline_ms: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request", "reason")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request: str
    reason: _common_pb2.Reason
    def __init__(self, request: _Optional[str] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class Located(_message.Message):
    __slots__ = ("request", "node", "serve_address")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SERVE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    request: str
    node: str
    serve_address: str
    def __init__(self, request: _Optional[str] = ..., node: _Optional[str] = ..., serve_address: _Optional[str] = ...) -> None: ...
