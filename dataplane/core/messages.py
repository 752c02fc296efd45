"""What goes into the worker daemon's core and what comes out: `step(state, event, now) -> effects`.

Protocol frames are those of controlplane.runtime.messages and dataplane.frames; here stand the events and effects
of the daemon alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType

from controlplane.runtime.ids import Epoch, ReplicaId, RequestId, Term
from controlplane.runtime.messages.common import Head, Reason
from controlplane.runtime.messages.serve import ServeDown, ServeHello, ServeUp
from controlplane.runtime.messages.session import AttachDown, AttachUp
from dataplane import frames

LinkId = NewType("LinkId", int)
"""One attempt at a session with a leader, as the shell numbers them; never reused in a process."""

StreamId = NewType("StreamId", int)
"""One Serve stream of a gateway, as the shell numbers them; never reused in a process."""

DeviceId = str

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class RankSample:
    """What the daemon sees of a rank from outside: its progress page and its process."""

    progress: int
    collective: int
    # Number of the step under way; 0 between steps.
    step: int
    # State letter of /proc/<pid>/stat; "T" is a stopped process.
    process_state: str
    # How long it has wanted a processor and had none, in all, as far as it was looked at.
    starved_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReading:
    """What a GPU's driver tells of it."""

    # Uncorrectable memory errors since the driver was loaded or the device reset.
    uncorrected: int = 0
    # A broken memory row could not be replaced by a spare one.
    remap_failed: bool = False
    # Xid numbers heard since the daemon began, each once.
    xids: tuple[int, ...] = ()
    # Why the driver cannot reach it; "" if it can.
    lost: str = ""


@dataclass(frozen=True, slots=True)
class DevicesRead:
    """Comes now and then, of GPUs alone."""

    readings: Mapping[DeviceId, DeviceReading]


@dataclass(frozen=True, slots=True)
class Tick:
    """Comes several times a heartbeat interval."""

    samples: Mapping[DeviceId, RankSample] = field(default_factory=dict[DeviceId, RankSample])
    # How late the daemon's loop ran, in seconds.
    loop_lag: float = 0.0


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """The node's key stands in etcd under this lease."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class LeaseGone:
    """The node's lease expired or was revoked; the shell takes a new one by itself. Nothing ends by it: a lease is lost
    while etcd is away, too, or while this whole machine stands still."""


@dataclass(frozen=True, slots=True)
class TermSeen:
    """Someone other than the session's leader told of a term: etcd, or a gateway."""

    term: Term
    address: str = ""


@dataclass(frozen=True, slots=True)
class LeaderOpened:
    """A stream to a supposed leader is open."""

    link: LinkId
    address: str


@dataclass(frozen=True, slots=True)
class LeaderSaid:
    link: LinkId
    head: Head
    body: AttachDown


@dataclass(frozen=True, slots=True)
class LeaderClosed:
    link: LinkId


@dataclass(frozen=True, slots=True)
class GatewayOpened:
    stream: StreamId
    hello: ServeHello


@dataclass(frozen=True, slots=True)
class GatewaySaid:
    stream: StreamId
    body: ServeUp


@dataclass(frozen=True, slots=True)
class GatewayWritable:
    """All that was sent on the stream has left: the next message may be made."""

    stream: StreamId


@dataclass(frozen=True, slots=True)
class GatewayClosed:
    stream: StreamId


@dataclass(frozen=True, slots=True)
class RankForked:
    device: DeviceId
    pid: int


@dataclass(frozen=True, slots=True)
class RankSaid:
    device: DeviceId
    pid: int
    frame: frames.RankFrame


@dataclass(frozen=True, slots=True)
class RankExited:
    """A rank process is gone, or could not be made (pid 0)."""

    device: DeviceId
    pid: int
    reason: Reason
    exit_code: int | None = None
    exit_signal: int | None = None
    # A SIGKILL from outside the process says nothing against the sequences that it ran.
    exonerates: bool = False


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The daemon is to drain and go."""

    reason: Reason


Event = (
    Tick
    | DevicesRead
    | LeaseGranted
    | LeaseGone
    | TermSeen
    | LeaderOpened
    | LeaderSaid
    | LeaderClosed
    | GatewayOpened
    | GatewaySaid
    | GatewayWritable
    | GatewayClosed
    | RankForked
    | RankSaid
    | RankExited
    | StopAsked
)

# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class SendLeader:
    """The shell adds the head (term, session, seq, ack)."""

    link: LinkId
    body: AttachUp


@dataclass(frozen=True, slots=True)
class LeaveLeader:
    """End the link and look for a leader of a higher term; `address` is where one was said to be."""

    link: LinkId
    reason: Reason
    highest_term: Term
    address: str = ""


@dataclass(frozen=True, slots=True)
class HintLeader:
    """A leader of this term was said to be at `address`."""

    address: str
    term: Term


@dataclass(frozen=True, slots=True)
class SendGateway:
    stream: StreamId
    body: ServeDown


@dataclass(frozen=True, slots=True)
class CloseGateway:
    """End the stream after what was sent before."""

    stream: StreamId
    reason: Reason


@dataclass(frozen=True, slots=True)
class SpawnRank:
    """Answered by RankForked, or by RankExited with pid 0."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class SendRank:
    device: DeviceId
    frame: frames.DaemonFrame


@dataclass(frozen=True, slots=True)
class MarkEpochsOver:
    """Put `epoch` on the rank's page: collectives of epochs up to it must be left."""

    device: DeviceId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class KillRank:
    """Answered by RankExited."""

    device: DeviceId
    pid: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class RenewLease:
    """Register the node anew under a fresh lease."""


@dataclass(frozen=True, slots=True)
class Depart:
    """Nothing is left to do: end streams and session, revoke the lease, close the listener, exit."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of what happened, when and why."""

    name: str
    replica: ReplicaId = ReplicaId("")
    epoch: Epoch = Epoch(0)
    request: RequestId = RequestId("")
    reason: Reason | None = None
    details: Mapping[str, str] = field(default_factory=dict[str, str])


Effect = (
    SendLeader
    | LeaveLeader
    | HintLeader
    | SendGateway
    | CloseGateway
    | SpawnRank
    | SendRank
    | MarkEpochsOver
    | KillRank
    | RenewLease
    | Depart
    | Recorded
)
