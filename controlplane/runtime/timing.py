"""Every time the cluster lives by, derived from two: failure_timeout F and heartbeat_interval H (PROTOCOL §6).

Seconds inside a process; whole milliseconds on the wire (`TimingSpec`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from controlplane.runtime.messages.common import TimingSpec

ETCD_EXPIRY_LAG_S = 0.5
"""etcd revokes an expired lease at its next check, every 500 ms."""

ETCD_CLIENT_KEEPALIVE_S = 6.0
"""etcd answers faster pings with GOAWAY too_many_pings (1 s did, 5.5 s did not); call deadlines notice sooner."""

ETCD_START_S = 30.0
"""An etcd child elects and serves within this, also with a long log to replay from a slow disk."""

ETCD_STOP_S = 5.0
"""An etcd child that was asked to end is killed after this."""


class TimingError(ValueError):
    """The two times do not give a sound order; the text names the pair that is wrong."""


@dataclass(frozen=True, slots=True)
class Timings:
    """All derived times, in seconds. Made by `derive_timings` only."""

    failure_timeout: float
    heartbeat_interval: float
    lease_ttl: int
    keepalive_period: float
    keepalive_deadline: float
    # Added to the *send* time of the last answered keepalive: how long a holder may trust its lease.
    lease_trust: float
    session_silence: float
    ping_time: float
    ping_timeout: float
    # A client of Inference that leaves a ping unanswered so long is gone; before, it is only late.
    client_patience: float
    probe_gap: float
    probe_connect: float
    progress_deadline: float
    collective_timeout: float
    leader_grace: float
    # Each stage of a group's forming, a session's handshake, an assignment without a body.
    stage: float
    reconnect_min: float
    reconnect_max: float
    # How long a worker keeps the shadow of a request whose gateway is gone.
    resume_grace: float
    resign: float
    # How long a load may stand still: between two LoadProgress frames lie a slow disk's largest tensor or one compile.
    load_progress: float
    # Requests wait this long for a deployment that has no replica ready; a lost node is hoped for as long.
    node_return: float
    # A drain's default: running streams finish until then, and move after it.
    drain: float
    # Failed attempts to bring a replica up count against its budget for this long.
    regroup_window: float
    # A replica that is slower than its equals for so long is told of.
    slow_for: float
    # Devices on which a shrunk replica could have its full size must have been there for so long: a node that comes and
    # goes would move its requests each time.
    grow_after: float

    def to_spec(self) -> TimingSpec:
        return TimingSpec(
            failure_timeout_ms=round(self.failure_timeout * 1000),
            heartbeat_interval_ms=round(self.heartbeat_interval * 1000),
        )


LAST_BITS_S = 1e-9
"""A product of whole milliseconds may be off by its last bits: 6 × 2.947 is above 17.682."""


def derive_timings(failure_timeout: float = 3.0, heartbeat_interval: float = 0.5) -> Timings:
    """The one place where times come from. Raises TimingError naming the pair that is in the wrong order."""
    f, h = failure_timeout, heartbeat_interval
    _require(h >= 0.05, f"heartbeat_interval ({h:g} s) must be at least 0.05 s")
    _require(f >= 6 * h - LAST_BITS_S, f"failure_timeout ({f:g} s) must be at least 6 × heartbeat_interval ({h:g} s)")
    _require(f >= 1, f"failure_timeout ({f:g} s) must be at least 1 s, the shortest lease etcd grants")
    ttl = math.floor(f)
    timings = Timings(
        failure_timeout=f,
        heartbeat_interval=h,
        lease_ttl=ttl,
        keepalive_period=min(h, ttl / 6),
        keepalive_deadline=ttl / 4,
        lease_trust=ttl - h,
        session_silence=3 * h,
        ping_time=max(h, 1.0),
        ping_timeout=h,
        client_patience=10 * f,
        probe_gap=0.05,
        probe_connect=h / 2,
        progress_deadline=f - 2 * h,
        collective_timeout=f - h,
        leader_grace=f + 2 * h,
        stage=f,
        reconnect_min=0.05,
        reconnect_max=h,
        resume_grace=10 * f,
        resign=10 * f,
        load_progress=10 * f,
        node_return=10 * f,
        drain=10 * f,
        regroup_window=60 * f,
        slow_for=10 * f,
        grow_after=10 * f,
    )
    _require(2 * h < timings.session_silence, "2 × heartbeat_interval must be below the session silence")
    _require(
        timings.session_silence <= timings.progress_deadline,
        f"the session silence ({timings.session_silence:g} s) must not exceed the progress deadline "
        f"({timings.progress_deadline:g} s)",
    )
    _require(
        timings.progress_deadline < timings.collective_timeout < f,
        f"progress deadline ({timings.progress_deadline:g} s) < collective timeout ({timings.collective_timeout:g} s) "
        f"< failure_timeout ({f:g} s) does not hold",
    )
    _require(timings.keepalive_period <= ttl / 3, "the keepalive period must be at most a third of the lease's TTL")
    return timings


def timings_from_spec(spec: TimingSpec) -> Timings:
    """The receiver's side of `Timings.to_spec`."""
    return derive_timings(spec.failure_timeout_ms / 1000, spec.heartbeat_interval_ms / 1000)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise TimingError(text)


MESSAGE_BYTES_MAX = 16 * 1024 * 1024

GrpcOptions = list[tuple[str, int]]


def server_options(timings: Timings) -> GrpcOptions:
    """Options of a gRPC server of peers: a stopped peer is noticed, a taken port is refused (PROTOCOL §7)."""
    return _server_options(timings, timings.ping_timeout)


def public_server_options(timings: Timings) -> GrpcOptions:
    """Options of a gRPC server of peers and clients. Peers are judged by their heartbeats there, so that pings need
    only find clients that are gone: one whose machine is busy answers late."""
    return _server_options(timings, timings.client_patience)


def _server_options(timings: Timings, ping_timeout: float) -> GrpcOptions:
    return [
        *_ping_options(timings, ping_timeout),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(timings.heartbeat_interval * 500)),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
    ]


def channel_options(timings: Timings) -> GrpcOptions:
    """Options of every gRPC channel inside the cluster: a restarted peer is reached at once (PROTOCOL §7)."""
    return [
        *_ping_options(timings, timings.ping_timeout),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Bounds one attempt to connect: a busy peer takes its time to answer, and is judged as later by its frames.
        ("grpc.min_reconnect_backoff_ms", round(timings.session_silence * 1000)),
        ("grpc.max_reconnect_backoff_ms", max(100, round(timings.heartbeat_interval * 1000))),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def _ping_options(timings: Timings, ping_timeout: float) -> GrpcOptions:
    # http2.ping_timeout_ms is the one that acts; keepalive_timeout_ms alone leaves a stopped peer unnoticed for 60 s.
    timeout_ms = round(ping_timeout * 1000)
    return [
        ("grpc.keepalive_time_ms", round(timings.ping_time * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ]
