from protos.perdure.v1 import common_pb2 as _common_pb2
from protos.perdure.v1 import session_pb2 as _session_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaderPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEADER_PHASE_UNSPECIFIED: _ClassVar[LeaderPhase]
    LEADER_PHASE_CANDIDATE: _ClassVar[LeaderPhase]
    LEADER_PHASE_REBUILDING: _ClassVar[LeaderPhase]
    LEADER_PHASE_LEADING: _ClassVar[LeaderPhase]
    LEADER_PHASE_FROZEN: _ClassVar[LeaderPhase]

class NodePhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_PHASE_UNSPECIFIED: _ClassVar[NodePhase]
    NODE_PHASE_KNOWN: _ClassVar[NodePhase]
    NODE_PHASE_LIVE: _ClassVar[NodePhase]
    NODE_PHASE_UNREACHABLE: _ClassVar[NodePhase]
    NODE_PHASE_DRAINING: _ClassVar[NodePhase]
    NODE_PHASE_LEFT: _ClassVar[NodePhase]
    NODE_PHASE_LOST: _ClassVar[NodePhase]

class FailurePhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_PHASE_UNSPECIFIED: _ClassVar[FailurePhase]
    FAILURE_PHASE_CLOSED: _ClassVar[FailurePhase]
    FAILURE_PHASE_FENCED: _ClassVar[FailurePhase]
    FAILURE_PHASE_REGROUPED: _ClassVar[FailurePhase]
    FAILURE_PHASE_REPLAYED: _ClassVar[FailurePhase]
    FAILURE_PHASE_FIRST_TOKEN: _ClassVar[FailurePhase]
LEADER_PHASE_UNSPECIFIED: LeaderPhase
LEADER_PHASE_CANDIDATE: LeaderPhase
LEADER_PHASE_REBUILDING: LeaderPhase
LEADER_PHASE_LEADING: LeaderPhase
LEADER_PHASE_FROZEN: LeaderPhase
NODE_PHASE_UNSPECIFIED: NodePhase
NODE_PHASE_KNOWN: NodePhase
NODE_PHASE_LIVE: NodePhase
NODE_PHASE_UNREACHABLE: NodePhase
NODE_PHASE_DRAINING: NodePhase
NODE_PHASE_LEFT: NodePhase
NODE_PHASE_LOST: NodePhase
FAILURE_PHASE_UNSPECIFIED: FailurePhase
FAILURE_PHASE_CLOSED: FailurePhase
FAILURE_PHASE_FENCED: FailurePhase
FAILURE_PHASE_REGROUPED: FailurePhase
FAILURE_PHASE_REPLAYED: FailurePhase
FAILURE_PHASE_FIRST_TOKEN: FailurePhase

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaderStatus(_message.Message):
    __slots__ = ("id", "pid", "address", "term", "phase", "incarnation")
    ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    id: str
    pid: int
    address: str
    term: int
    phase: LeaderPhase
    incarnation: str
    def __init__(self, id: _Optional[str] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ..., term: _Optional[int] = ..., phase: _Optional[_Union[LeaderPhase, str]] = ..., incarnation: _Optional[str] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("id", "host", "pid", "phase", "ranks", "serve_address", "incarnation", "silent_ms", "reason", "loop_lag_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SERVE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SILENT_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LOOP_LAG_MS_FIELD_NUMBER: _ClassVar[int]
    id: str
    host: str
    pid: int
    phase: NodePhase
    ranks: _containers.RepeatedCompositeFieldContainer[_session_pb2.RankInfo]
    serve_address: str
    incarnation: str
    silent_ms: int
    reason: _common_pb2.Reason
    loop_lag_ms: int
    def __init__(self, id: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., phase: _Optional[_Union[NodePhase, str]] = ..., ranks: _Optional[_Iterable[_Union[_session_pb2.RankInfo, _Mapping]]] = ..., serve_address: _Optional[str] = ..., incarnation: _Optional[str] = ..., silent_ms: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., loop_lag_ms: _Optional[int] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("id", "phase", "epoch", "running", "waiting", "free_blocks", "total_blocks", "deployment", "members", "step_ms", "reason", "load_fraction", "load_stage", "numerics", "attention", "degrees")
    ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LOAD_FRACTION_FIELD_NUMBER: _ClassVar[int]
    LOAD_STAGE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    DEGREES_FIELD_NUMBER: _ClassVar[int]
    id: str
    phase: _common_pb2.ReplicaPhase
    epoch: int
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    deployment: str
    members: _containers.RepeatedCompositeFieldContainer[_common_pb2.Member]
    step_ms: float
    reason: _common_pb2.Reason
    load_fraction: float
    load_stage: str
    numerics: str
    attention: str
    degrees: _common_pb2.ParallelDegrees
    def __init__(self, id: _Optional[str] = ..., phase: _Optional[_Union[_common_pb2.ReplicaPhase, str]] = ..., epoch: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., deployment: _Optional[str] = ..., members: _Optional[_Iterable[_Union[_common_pb2.Member, _Mapping]]] = ..., step_ms: _Optional[float] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., load_fraction: _Optional[float] = ..., load_stage: _Optional[str] = ..., numerics: _Optional[str] = ..., attention: _Optional[str] = ..., degrees: _Optional[_Union[_common_pb2.ParallelDegrees, _Mapping]] = ...) -> None: ...

class GatewayStatus(_message.Message):
    __slots__ = ("id", "pid", "url", "open_requests")
    ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    pid: int
    url: str
    open_requests: int
    def __init__(self, id: _Optional[str] = ..., pid: _Optional[int] = ..., url: _Optional[str] = ..., open_requests: _Optional[int] = ...) -> None: ...

class DeploymentStatus(_message.Message):
    __slots__ = ("id", "model", "model_path", "replicas", "ready", "degrees", "numerics", "reason", "spares", "spares_ready")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DEGREES_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SPARES_FIELD_NUMBER: _ClassVar[int]
    SPARES_READY_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    model_path: str
    replicas: int
    ready: int
    degrees: _common_pb2.ParallelDegrees
    numerics: str
    reason: str
    spares: int
    spares_ready: int
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., model_path: _Optional[str] = ..., replicas: _Optional[int] = ..., ready: _Optional[int] = ..., degrees: _Optional[_Union[_common_pb2.ParallelDegrees, _Mapping]] = ..., numerics: _Optional[str] = ..., reason: _Optional[str] = ..., spares: _Optional[int] = ..., spares_ready: _Optional[int] = ...) -> None: ...

class FencedCount(_message.Message):
    __slots__ = ("frame", "count")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    frame: str
    count: int
    def __init__(self, frame: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("cluster", "leader", "nodes", "replicas", "gateways", "deployments", "fenced", "timing", "answered_by", "answerer", "limited")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_BY_FIELD_NUMBER: _ClassVar[int]
    ANSWERER_FIELD_NUMBER: _ClassVar[int]
    LIMITED_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    leader: LeaderStatus
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    gateways: _containers.RepeatedCompositeFieldContainer[GatewayStatus]
    deployments: _containers.RepeatedCompositeFieldContainer[DeploymentStatus]
    fenced: _containers.RepeatedCompositeFieldContainer[FencedCount]
    timing: _common_pb2.TimingSpec
    answered_by: str
    answerer: str
    limited: _common_pb2.Reason
    def __init__(self, cluster: _Optional[str] = ..., leader: _Optional[_Union[LeaderStatus, _Mapping]] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., gateways: _Optional[_Iterable[_Union[GatewayStatus, _Mapping]]] = ..., deployments: _Optional[_Iterable[_Union[DeploymentStatus, _Mapping]]] = ..., fenced: _Optional[_Iterable[_Union[FencedCount, _Mapping]]] = ..., timing: _Optional[_Union[_common_pb2.TimingSpec, _Mapping]] = ..., answered_by: _Optional[str] = ..., answerer: _Optional[str] = ..., limited: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class ListRequestsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RequestStatus(_message.Message):
    __slots__ = ("id", "gateway", "attempt", "phase", "replica", "epoch", "priority", "tenant", "prompt_tokens", "max_tokens", "age_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    id: str
    gateway: str
    attempt: int
    phase: str
    replica: str
    epoch: int
    priority: int
    tenant: str
    prompt_tokens: int
    max_tokens: int
    age_ms: int
    def __init__(self, id: _Optional[str] = ..., gateway: _Optional[str] = ..., attempt: _Optional[int] = ..., phase: _Optional[str] = ..., replica: _Optional[str] = ..., epoch: _Optional[int] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., age_ms: _Optional[int] = ...) -> None: ...

class ListRequestsResponse(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RequestStatus]
    def __init__(self, requests: _Optional[_Iterable[_Union[RequestStatus, _Mapping]]] = ...) -> None: ...

class EventsRequest(_message.Message):
    __slots__ = ("follow", "last", "own")
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    follow: bool
    last: int
    own: bool
    def __init__(self, follow: _Optional[bool] = ..., last: _Optional[int] = ..., own: _Optional[bool] = ...) -> None: ...

class EventsResponse(_message.Message):
    __slots__ = ("seq", "wall_ms", "name", "node", "replica", "epoch", "request", "reason", "details", "term")
    class DetailsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SEQ_FIELD_NUMBER: _ClassVar[int]
    WALL_MS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    seq: int
    wall_ms: int
    name: str
    node: str
    replica: str
    epoch: int
    request: str
    reason: _common_pb2.Reason
    details: _containers.ScalarMap[str, str]
    term: int
    def __init__(self, seq: _Optional[int] = ..., wall_ms: _Optional[int] = ..., name: _Optional[str] = ..., node: _Optional[str] = ..., replica: _Optional[str] = ..., epoch: _Optional[int] = ..., request: _Optional[str] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., details: _Optional[_Mapping[str, str]] = ..., term: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("node", "deadline_ms", "exit")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    node: str
    deadline_ms: int
    exit: bool
    def __init__(self, node: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., exit: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("phase",)
    PHASE_FIELD_NUMBER: _ClassVar[int]
    phase: NodePhase
    def __init__(self, phase: _Optional[_Union[NodePhase, str]] = ...) -> None: ...

class UndrainRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class UndrainResponse(_message.Message):
    __slots__ = ("phase",)
    PHASE_FIELD_NUMBER: _ClassVar[int]
    phase: NodePhase
    def __init__(self, phase: _Optional[_Union[NodePhase, str]] = ...) -> None: ...

class CancelRequestRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: str
    def __init__(self, request: _Optional[str] = ...) -> None: ...

class CancelRequestResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeploymentSpec(_message.Message):
    __slots__ = ("deployment", "model", "replicas", "spec", "recovery_strategy", "max_retries", "spares", "slow_nodes")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_STRATEGY_FIELD_NUMBER: _ClassVar[int]
    MAX_RETRIES_FIELD_NUMBER: _ClassVar[int]
    SPARES_FIELD_NUMBER: _ClassVar[int]
    SLOW_NODES_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    model: str
    replicas: int
    spec: _common_pb2.ReplicaSpec
    recovery_strategy: str
    max_retries: int
    spares: int
    slow_nodes: str
    def __init__(self, deployment: _Optional[str] = ..., model: _Optional[str] = ..., replicas: _Optional[int] = ..., spec: _Optional[_Union[_common_pb2.ReplicaSpec, _Mapping]] = ..., recovery_strategy: _Optional[str] = ..., max_retries: _Optional[int] = ..., spares: _Optional[int] = ..., slow_nodes: _Optional[str] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: DeploymentSpec
    def __init__(self, deployment: _Optional[_Union[DeploymentSpec, _Mapping]] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("created",)
    CREATED_FIELD_NUMBER: _ClassVar[int]
    created: bool
    def __init__(self, created: _Optional[bool] = ...) -> None: ...

class ListFailuresRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FailureStep(_message.Message):
    __slots__ = ("phase", "after_ms")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    phase: FailurePhase
    after_ms: int
    def __init__(self, phase: _Optional[_Union[FailurePhase, str]] = ..., after_ms: _Optional[int] = ...) -> None: ...

class FailureStatus(_message.Message):
    __slots__ = ("age_ms", "replica", "epoch", "node", "reason", "steps", "next_epoch", "requests", "homeless", "silent", "suspects", "gap_ms_max", "over")
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NEXT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    HOMELESS_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    SUSPECTS_FIELD_NUMBER: _ClassVar[int]
    GAP_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    age_ms: int
    replica: str
    epoch: int
    node: str
    reason: _common_pb2.Reason
    steps: _containers.RepeatedCompositeFieldContainer[FailureStep]
    next_epoch: int
    requests: int
    homeless: int
    silent: int
    suspects: _containers.RepeatedScalarFieldContainer[str]
    gap_ms_max: int
    over: bool
    def __init__(self, age_ms: _Optional[int] = ..., replica: _Optional[str] = ..., epoch: _Optional[int] = ..., node: _Optional[str] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[FailureStep, _Mapping]]] = ..., next_epoch: _Optional[int] = ..., requests: _Optional[int] = ..., homeless: _Optional[int] = ..., silent: _Optional[int] = ..., suspects: _Optional[_Iterable[str]] = ..., gap_ms_max: _Optional[int] = ..., over: _Optional[bool] = ...) -> None: ...

class ListFailuresResponse(_message.Message):
    __slots__ = ("failures",)
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    failures: _containers.RepeatedCompositeFieldContainer[FailureStatus]
    def __init__(self, failures: _Optional[_Iterable[_Union[FailureStatus, _Mapping]]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("deployment", "replicas")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    replicas: int
    def __init__(self, deployment: _Optional[str] = ..., replicas: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    def __init__(self, deployment: _Optional[str] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    def __init__(self, incarnation: _Optional[str] = ...) -> None: ...
