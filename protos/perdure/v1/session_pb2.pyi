from protos.perdure.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SequencePhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEQUENCE_PHASE_UNSPECIFIED: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_RESERVED: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_WAITING: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_RUNNING: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_FINISHED: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_ORPHAN: _ClassVar[SequencePhase]
    SEQUENCE_PHASE_LOST: _ClassVar[SequencePhase]

class GroupPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROUP_PHASE_UNSPECIFIED: _ClassVar[GroupPhase]
    GROUP_PHASE_PREPARED: _ClassVar[GroupPhase]
    GROUP_PHASE_FORMED: _ClassVar[GroupPhase]
    GROUP_PHASE_LOADED: _ClassVar[GroupPhase]
    GROUP_PHASE_ABORTED: _ClassVar[GroupPhase]
    GROUP_PHASE_RELEASED: _ClassVar[GroupPhase]
SEQUENCE_PHASE_UNSPECIFIED: SequencePhase
SEQUENCE_PHASE_RESERVED: SequencePhase
SEQUENCE_PHASE_WAITING: SequencePhase
SEQUENCE_PHASE_RUNNING: SequencePhase
SEQUENCE_PHASE_FINISHED: SequencePhase
SEQUENCE_PHASE_ORPHAN: SequencePhase
SEQUENCE_PHASE_LOST: SequencePhase
GROUP_PHASE_UNSPECIFIED: GroupPhase
GROUP_PHASE_PREPARED: GroupPhase
GROUP_PHASE_FORMED: GroupPhase
GROUP_PHASE_LOADED: GroupPhase
GROUP_PHASE_ABORTED: GroupPhase
GROUP_PHASE_RELEASED: GroupPhase

class AttachRequest(_message.Message):
    __slots__ = ("head", "hello", "snapshot", "heartbeat", "rank_state", "group_state", "load_progress", "assign_lapsed", "drained", "leaving", "fenced", "weights_state")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    RANK_STATE_FIELD_NUMBER: _ClassVar[int]
    GROUP_STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_LAPSED_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_STATE_FIELD_NUMBER: _ClassVar[int]
    head: _common_pb2.Head
    hello: WorkerHello
    snapshot: WorkerSnapshot
    heartbeat: Heartbeat
    rank_state: RankState
    group_state: GroupState
    load_progress: LoadProgress
    assign_lapsed: AssignLapsed
    drained: Drained
    leaving: Leaving
    fenced: Fenced
    weights_state: WeightsState
    def __init__(self, head: _Optional[_Union[_common_pb2.Head, _Mapping]] = ..., hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., snapshot: _Optional[_Union[WorkerSnapshot, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., rank_state: _Optional[_Union[RankState, _Mapping]] = ..., group_state: _Optional[_Union[GroupState, _Mapping]] = ..., load_progress: _Optional[_Union[LoadProgress, _Mapping]] = ..., assign_lapsed: _Optional[_Union[AssignLapsed, _Mapping]] = ..., drained: _Optional[_Union[Drained, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., fenced: _Optional[_Union[Fenced, _Mapping]] = ..., weights_state: _Optional[_Union[WeightsState, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("cluster", "node", "incarnation", "serve_address", "boot_id", "highest_term_seen", "lease_id", "devices", "host", "pid", "versions")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SERVE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_TERM_SEEN_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    node: str
    incarnation: str
    serve_address: str
    boot_id: str
    highest_term_seen: int
    lease_id: int
    devices: _containers.RepeatedCompositeFieldContainer[_common_pb2.Device]
    host: str
    pid: int
    versions: _containers.ScalarMap[str, str]
    def __init__(self, cluster: _Optional[str] = ..., node: _Optional[str] = ..., incarnation: _Optional[str] = ..., serve_address: _Optional[str] = ..., boot_id: _Optional[str] = ..., highest_term_seen: _Optional[int] = ..., lease_id: _Optional[int] = ..., devices: _Optional[_Iterable[_Union[_common_pb2.Device, _Mapping]]] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ...) -> None: ...

class WorkerSnapshot(_message.Message):
    __slots__ = ("ranks", "replicas", "sequences", "last", "draining")
    RANKS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedCompositeFieldContainer[RankInfo]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaInfo]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceInfo]
    last: bool
    draining: bool
    def __init__(self, ranks: _Optional[_Iterable[_Union[RankInfo, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaInfo, _Mapping]]] = ..., sequences: _Optional[_Iterable[_Union[SequenceInfo, _Mapping]]] = ..., last: _Optional[bool] = ..., draining: _Optional[bool] = ...) -> None: ...

class RankInfo(_message.Message):
    __slots__ = ("device", "pid", "phase", "replica", "epoch", "rank", "held")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    device: str
    pid: int
    phase: _common_pb2.RankPhase
    replica: str
    epoch: int
    rank: int
    held: HeldWeights
    def __init__(self, device: _Optional[str] = ..., pid: _Optional[int] = ..., phase: _Optional[_Union[_common_pb2.RankPhase, str]] = ..., replica: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., held: _Optional[_Union[HeldWeights, _Mapping]] = ...) -> None: ...

class HeldWeights(_message.Message):
    __slots__ = ("deployment", "degrees", "rank", "fingerprint", "address")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    DEGREES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    degrees: _common_pb2.ParallelDegrees
    rank: int
    fingerprint: str
    address: str
    def __init__(self, deployment: _Optional[str] = ..., degrees: _Optional[_Union[_common_pb2.ParallelDegrees, _Mapping]] = ..., rank: _Optional[int] = ..., fingerprint: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class WeightsState(_message.Message):
    __slots__ = ("device", "pid", "held", "reason")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device: str
    pid: int
    held: HeldWeights
    reason: _common_pb2.Reason
    def __init__(self, device: _Optional[str] = ..., pid: _Optional[int] = ..., held: _Optional[_Union[HeldWeights, _Mapping]] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class ReplicaInfo(_message.Message):
    __slots__ = ("replica", "epoch", "phase", "capacity")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    phase: _common_pb2.ReplicaPhase
    capacity: _common_pb2.Capacity
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., phase: _Optional[_Union[_common_pb2.ReplicaPhase, str]] = ..., capacity: _Optional[_Union[_common_pb2.Capacity, _Mapping]] = ...) -> None: ...

class SequenceInfo(_message.Message):
    __slots__ = ("gateway", "request", "attempt", "replica", "epoch", "phase", "tokens", "choices")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    gateway: str
    request: str
    attempt: int
    replica: str
    epoch: int
    phase: SequencePhase
    tokens: int
    choices: int
    def __init__(self, gateway: _Optional[str] = ..., request: _Optional[str] = ..., attempt: _Optional[int] = ..., replica: _Optional[str] = ..., epoch: _Optional[int] = ..., phase: _Optional[_Union[SequencePhase, str]] = ..., tokens: _Optional[int] = ..., choices: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("uptime_ms", "loop_lag_ms", "replicas", "health")
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    LOOP_LAG_MS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    uptime_ms: int
    loop_lag_ms: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaLoad]
    health: _containers.RepeatedCompositeFieldContainer[DeviceHealth]
    def __init__(self, uptime_ms: _Optional[int] = ..., loop_lag_ms: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaLoad, _Mapping]]] = ..., health: _Optional[_Iterable[_Union[DeviceHealth, _Mapping]]] = ...) -> None: ...

class ReplicaLoad(_message.Message):
    __slots__ = ("replica", "epoch", "free_blocks", "running", "waiting", "step_ms", "progress", "prefix_digest", "waiting_tokens", "queue", "starved_ms")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    STARVED_MS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    free_blocks: int
    running: int
    waiting: int
    step_ms: float
    progress: int
    prefix_digest: bytes
    waiting_tokens: int
    queue: _containers.RepeatedCompositeFieldContainer[QueueClass]
    starved_ms: int
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., free_blocks: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., step_ms: _Optional[float] = ..., progress: _Optional[int] = ..., prefix_digest: _Optional[bytes] = ..., waiting_tokens: _Optional[int] = ..., queue: _Optional[_Iterable[_Union[QueueClass, _Mapping]]] = ..., starved_ms: _Optional[int] = ...) -> None: ...

class QueueClass(_message.Message):
    __slots__ = ("priority", "count", "tokens")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    priority: int
    count: int
    tokens: int
    def __init__(self, priority: _Optional[int] = ..., count: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class DeviceHealth(_message.Message):
    __slots__ = ("device", "ok", "reason")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device: str
    ok: bool
    reason: _common_pb2.Reason
    def __init__(self, device: _Optional[str] = ..., ok: _Optional[bool] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class RankState(_message.Message):
    __slots__ = ("device", "pid", "replica", "epoch", "rank", "phase", "reason", "exit_code", "exit_signal", "suspects")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    EXIT_SIGNAL_FIELD_NUMBER: _ClassVar[int]
    SUSPECTS_FIELD_NUMBER: _ClassVar[int]
    device: str
    pid: int
    replica: str
    epoch: int
    rank: int
    phase: _common_pb2.RankPhase
    reason: _common_pb2.Reason
    exit_code: int
    exit_signal: int
    suspects: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, device: _Optional[str] = ..., pid: _Optional[int] = ..., replica: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., phase: _Optional[_Union[_common_pb2.RankPhase, str]] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., exit_code: _Optional[int] = ..., exit_signal: _Optional[int] = ..., suspects: _Optional[_Iterable[str]] = ...) -> None: ...

class GroupState(_message.Message):
    __slots__ = ("replica", "epoch", "phase", "ok", "reason", "rendezvous", "capacity")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    phase: GroupPhase
    ok: bool
    reason: _common_pb2.Reason
    rendezvous: str
    capacity: _common_pb2.Capacity
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., phase: _Optional[_Union[GroupPhase, str]] = ..., ok: _Optional[bool] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., rendezvous: _Optional[str] = ..., capacity: _Optional[_Union[_common_pb2.Capacity, _Mapping]] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("replica", "epoch", "stage", "fraction")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    stage: str
    fraction: float
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., stage: _Optional[str] = ..., fraction: _Optional[float] = ...) -> None: ...

class AssignLapsed(_message.Message):
    __slots__ = ("permits",)
    PERMITS_FIELD_NUMBER: _ClassVar[int]
    permits: _containers.RepeatedCompositeFieldContainer[_common_pb2.Permit]
    def __init__(self, permits: _Optional[_Iterable[_Union[_common_pb2.Permit, _Mapping]]] = ...) -> None: ...

class Drained(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("deadline_ms", "reason")
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    reason: _common_pb2.Reason
    def __init__(self, deadline_ms: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class Fenced(_message.Message):
    __slots__ = ("frame", "seen_term", "seen_epoch", "highest_term")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    SEEN_TERM_FIELD_NUMBER: _ClassVar[int]
    SEEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_TERM_FIELD_NUMBER: _ClassVar[int]
    frame: str
    seen_term: int
    seen_epoch: int
    highest_term: int
    def __init__(self, frame: _Optional[str] = ..., seen_term: _Optional[int] = ..., seen_epoch: _Optional[int] = ..., highest_term: _Optional[int] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("head", "welcome", "refused", "assign", "prepare", "form", "load", "abort", "release", "drain", "undrain", "relet", "checkpoint", "preload")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    UNDRAIN_FIELD_NUMBER: _ClassVar[int]
    RELET_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PRELOAD_FIELD_NUMBER: _ClassVar[int]
    head: _common_pb2.Head
    welcome: WorkerWelcome
    refused: SessionRefused
    assign: AssignBatch
    prepare: PrepareGroup
    form: FormGroup
    load: LoadReplica
    abort: AbortGroup
    release: ReleaseReplica
    drain: DrainNode
    undrain: UndrainNode
    relet: Relet
    checkpoint: TakeCheckpoint
    preload: PreloadWeights
    def __init__(self, head: _Optional[_Union[_common_pb2.Head, _Mapping]] = ..., welcome: _Optional[_Union[WorkerWelcome, _Mapping]] = ..., refused: _Optional[_Union[SessionRefused, _Mapping]] = ..., assign: _Optional[_Union[AssignBatch, _Mapping]] = ..., prepare: _Optional[_Union[PrepareGroup, _Mapping]] = ..., form: _Optional[_Union[FormGroup, _Mapping]] = ..., load: _Optional[_Union[LoadReplica, _Mapping]] = ..., abort: _Optional[_Union[AbortGroup, _Mapping]] = ..., release: _Optional[_Union[ReleaseReplica, _Mapping]] = ..., drain: _Optional[_Union[DrainNode, _Mapping]] = ..., undrain: _Optional[_Union[UndrainNode, _Mapping]] = ..., relet: _Optional[_Union[Relet, _Mapping]] = ..., checkpoint: _Optional[_Union[TakeCheckpoint, _Mapping]] = ..., preload: _Optional[_Union[PreloadWeights, _Mapping]] = ...) -> None: ...

class WorkerWelcome(_message.Message):
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

class SessionRefused(_message.Message):
    __slots__ = ("reason", "highest_term", "leader_address")
    REASON_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_TERM_FIELD_NUMBER: _ClassVar[int]
    LEADER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.Reason
    highest_term: int
    leader_address: str
    def __init__(self, reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., highest_term: _Optional[int] = ..., leader_address: _Optional[str] = ...) -> None: ...

class AssignBatch(_message.Message):
    __slots__ = ("permits",)
    PERMITS_FIELD_NUMBER: _ClassVar[int]
    permits: _containers.RepeatedCompositeFieldContainer[_common_pb2.Permit]
    def __init__(self, permits: _Optional[_Iterable[_Union[_common_pb2.Permit, _Mapping]]] = ...) -> None: ...

class PrepareGroup(_message.Message):
    __slots__ = ("replica", "epoch", "members", "nonce", "spec", "deadline_ms")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    members: _containers.RepeatedCompositeFieldContainer[_common_pb2.Member]
    nonce: str
    spec: _common_pb2.ReplicaSpec
    deadline_ms: int
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., members: _Optional[_Iterable[_Union[_common_pb2.Member, _Mapping]]] = ..., nonce: _Optional[str] = ..., spec: _Optional[_Union[_common_pb2.ReplicaSpec, _Mapping]] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class FormGroup(_message.Message):
    __slots__ = ("replica", "epoch", "rendezvous", "deadline_ms")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    rendezvous: str
    deadline_ms: int
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., rendezvous: _Optional[str] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class LoadReplica(_message.Message):
    __slots__ = ("replica", "epoch", "deadline_ms", "sources")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    deadline_ms: int
    sources: _containers.RepeatedCompositeFieldContainer[WeightSource]
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[WeightSource, _Mapping]]] = ...) -> None: ...

class WeightSource(_message.Message):
    __slots__ = ("degrees", "rank", "address")
    DEGREES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    degrees: _common_pb2.ParallelDegrees
    rank: int
    address: str
    def __init__(self, degrees: _Optional[_Union[_common_pb2.ParallelDegrees, _Mapping]] = ..., rank: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class PreloadWeights(_message.Message):
    __slots__ = ("device", "rank", "spec", "sources")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    device: str
    rank: int
    spec: _common_pb2.ReplicaSpec
    sources: _containers.RepeatedCompositeFieldContainer[WeightSource]
    def __init__(self, device: _Optional[str] = ..., rank: _Optional[int] = ..., spec: _Optional[_Union[_common_pb2.ReplicaSpec, _Mapping]] = ..., sources: _Optional[_Iterable[_Union[WeightSource, _Mapping]]] = ...) -> None: ...

class AbortGroup(_message.Message):
    __slots__ = ("replica", "epoch", "reason")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    reason: _common_pb2.Reason
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class ReleaseReplica(_message.Message):
    __slots__ = ("replica", "epoch", "reason")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    reason: _common_pb2.Reason
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class DrainNode(_message.Message):
    __slots__ = ("deadline_ms", "reason", "exit")
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    reason: _common_pb2.Reason
    exit: bool
    def __init__(self, deadline_ms: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ..., exit: _Optional[bool] = ...) -> None: ...

class UndrainNode(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Relet(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.Reason
    def __init__(self, reason: _Optional[_Union[_common_pb2.Reason, _Mapping]] = ...) -> None: ...

class TakeCheckpoint(_message.Message):
    __slots__ = ("checkpoint", "path", "deadline_ms")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    path: str
    deadline_ms: int
    def __init__(self, checkpoint: _Optional[str] = ..., path: _Optional[str] = ..., deadline_ms: _Optional[int] = ...) -> None: ...
