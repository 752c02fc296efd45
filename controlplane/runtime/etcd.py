"""The etcd client: several endpoints, TLS, credentials, and a deadline on every call.

Built on etcd3aio's generated stubs, because its own helpers renew leases without a per-call deadline and watch
across compactions without noticing. Foreign errors are mapped here, once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import grpc.aio
import structlog

from controlplane.runtime.clock import Clock
from controlplane.runtime.errors import PerdureError, Rejected, invalid
from controlplane.runtime.etcd_rpc import CallOptions, EtcdRpc, Metadata, tls_credentials
from controlplane.runtime.etcd_types import (
    EtcdAlarm,
    EtcdDenied,
    EtcdLeaseGone,
    EtcdMember,
    EtcdOptions,
    EtcdStatus,
    EtcdUnavailable,
    KeyValue,
    Lease,
    Put,
    Snapshot,
    Txn,
    TxnResult,
    prefix_end,
)
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.timing import ETCD_CLIENT_KEEPALIVE_S, MESSAGE_BYTES_MAX, GrpcOptions, Timings

T = TypeVar("T")

log = structlog.get_logger()

ETCD_ERRORS = (EtcdUnavailable, EtcdDenied)
"""What a background task that talks to etcd must outlive."""


class EtcdClient:
    """Calls to an etcd cluster from one event loop.

    Calls go to one endpoint at a time. A missed deadline ends the call with EtcdUnavailable and moves the client to the
    next endpoint; a refusal tries the other endpoints within the same call. A write that ended with EtcdUnavailable
    may have happened, so callers write what may be written twice. `timeout` is in seconds.
    """

    def __init__(self, options: EtcdOptions, timings: Timings, clock: Clock) -> None:
        """Raises Rejected for an unusable option, naming it. Connects at the first call."""
        self._options = options
        self._clock = clock
        self._retry_ms = round(timings.reconnect_max * 1000)
        credentials = _credentials(options)
        channel_options = _channel_options(timings)
        self._rpcs = [EtcdRpc(address, credentials, channel_options) for address in _addresses(options)]
        self._current = 0
        self._token = ""

    @property
    def endpoint(self) -> str:
        """Address of the endpoint that the next call goes to."""
        return self._rpcs[self._current].address

    async def close(self) -> None:
        for rpc in self._rpcs:
            await rpc.close()

    async def get(self, key: str, *, timeout: float) -> KeyValue | None:
        snapshot = await self._call(lambda rpc, call: rpc.range(key.encode(), b"", call), timeout)
        return snapshot.items[0] if snapshot.items else None

    async def get_prefix(self, prefix: str, *, timeout: float) -> Snapshot:
        """All keys that start with `prefix`, as they stood together at one revision."""
        end = prefix_end(prefix)
        return await self._call(lambda rpc, call: rpc.range(prefix.encode(), end, call), timeout)

    async def put(self, key: str, value: bytes, *, timeout: float, lease: int = 0) -> int:
        """Revision of the put. Raises EtcdLeaseGone."""
        result = await self.txn(Txn(when=(), success=(Put(key, value, lease),)), timeout=timeout)
        return result.revision

    async def delete(self, key: str, *, timeout: float) -> bool:
        """False if there was no such key."""
        return await self._call(lambda rpc, call: rpc.delete_range(key.encode(), b"", call), timeout) > 0

    async def delete_prefix(self, prefix: str, *, timeout: float) -> int:
        """Number of keys deleted."""
        end = prefix_end(prefix)
        return await self._call(lambda rpc, call: rpc.delete_range(prefix.encode(), end, call), timeout)

    async def txn(self, txn: Txn, *, timeout: float) -> TxnResult:
        """Raises EtcdLeaseGone if a put names a lease that is gone."""
        return await self._call(lambda rpc, call: rpc.txn(txn, call), timeout)

    async def compact(self, revision: int, *, timeout: float) -> None:
        """Forget all history below `revision`."""
        await self._call(lambda rpc, call: rpc.compact(revision, call), timeout)

    async def lease_grant(self, ttl: int, *, timeout: float) -> Lease:
        """A new lease of at least `ttl` seconds; what etcd granted is in the answer."""
        return await self._call(lambda rpc, call: rpc.lease_grant(ttl, call), timeout)

    async def keepalive_once(self, lease: int, *, timeout: float) -> int:
        """Renew once. The new TTL in seconds, counted from some time after the call began; 0 if the lease is gone."""
        ttl = await self._call(lambda rpc, call: rpc.lease_keepalive(lease, call), timeout)
        if ttl is None:
            self._move_on(self._current)
            raise EtcdUnavailable(f"etcd at {self.endpoint} ended a keepalive unanswered", self._retry_ms)
        return ttl

    async def lease_revoke(self, lease: int, *, timeout: float) -> bool:
        """End the lease and delete its keys. False if it was gone already."""
        try:
            await self._call(lambda rpc, call: rpc.lease_revoke(lease, call), timeout)
        except EtcdLeaseGone:
            return False
        return True

    async def lease_remaining(self, lease: int, *, timeout: float) -> int:
        """Seconds until the lease expires; -1 if it is gone."""
        return await self._call(lambda rpc, call: rpc.lease_remaining(lease, call), timeout)

    async def status(self, *, timeout: float) -> EtcdStatus:
        """The view of the member that answers."""
        return await self._call(lambda rpc, call: rpc.status(call), timeout)

    async def members(self, *, timeout: float) -> tuple[EtcdMember, ...]:
        return await self._call(lambda rpc, call: rpc.members(call), timeout)

    async def alarms(self, *, timeout: float) -> tuple[EtcdAlarm, ...]:
        return await self._call(lambda rpc, call: rpc.alarms(call), timeout)

    def stream_target(self) -> tuple[EtcdRpc, CallOptions]:
        """Endpoint and metadata for a stream, good after a call that was answered: that one refreshed the token. The
        stream's failure is to be told to `stream_failed`."""
        # hasleader: a member cut off from the others ends the stream instead of staying silent.
        metadata = (*self._metadata(), ("hasleader", "true"))
        return self._rpcs[self._current], CallOptions(metadata, None)

    def stream_failed(self, rpc: EtcdRpc, why: grpc.aio.AioRpcError | str) -> PerdureError:
        """Move on from `rpc`'s endpoint. The error to raise."""
        self._move_on(self._rpcs.index(rpc))
        if isinstance(why, str):
            return EtcdUnavailable(f"etcd at {rpc.address}: {why}", self._retry_ms)
        return self._map(why, rpc)

    async def _call(self, method: Callable[[EtcdRpc, CallOptions], Awaitable[T]], timeout: float) -> T:
        deadline = self._clock.now() + timeout
        for _ in self._rpcs[1:]:
            index = self._current
            try:
                return await self._call_endpoint(self._rpcs[index], method, deadline)
            except EtcdUnavailable:
                self._move_on(index)
                if self._clock.now() >= deadline:
                    raise
        index = self._current
        try:
            return await self._call_endpoint(self._rpcs[index], method, deadline)
        except EtcdUnavailable:
            self._move_on(index)
            raise

    async def _call_endpoint(
        self, rpc: EtcdRpc, method: Callable[[EtcdRpc, CallOptions], Awaitable[T]], deadline: float
    ) -> T:
        """One attempt; a second one with a fresh token if etcd refused the old."""
        if self._options.user and not self._token:
            await self._authenticate(rpc, deadline)
        try:
            return await method(rpc, self._until(deadline))
        except grpc.aio.AioRpcError as error:
            if not (self._options.user and _token_is_stale(error)):
                raise self._map(error, rpc) from error
        await self._authenticate(rpc, deadline)
        try:
            return await method(rpc, self._until(deadline))
        except grpc.aio.AioRpcError as error:
            raise self._map(error, rpc) from error

    async def _authenticate(self, rpc: EtcdRpc, deadline: float) -> None:
        self._token = ""
        try:
            self._token = await rpc.authenticate(self._options.user, self._options.password, self._until(deadline))
        except grpc.aio.AioRpcError as error:
            # As etcd's own client does: credentials that nobody asks for are no error.
            if "authentication is not enabled" not in (error.details() or ""):
                raise self._map(error, rpc) from error

    def _until(self, deadline: float) -> CallOptions:
        return CallOptions(self._metadata(), max(0.0, deadline - self._clock.now()))

    def _metadata(self) -> Metadata:
        return (("token", self._token),) if self._token else ()

    def _move_on(self, index: int) -> None:
        """The endpoint `index` failed. A call that failed on an endpoint already left moves nothing."""
        if index == self._current and len(self._rpcs) > 1:
            self._current = (index + 1) % len(self._rpcs)
            log.info("etcd_endpoint_changed", failed=self._rpcs[index].address, endpoint=self.endpoint)

    def _map(self, error: grpc.aio.AioRpcError, rpc: EtcdRpc) -> PerdureError:
        text = f"etcd at {rpc.address}: {error.details() or error.code().name}"
        if _is_denial(error):
            return EtcdDenied(text)
        match error.code():
            case grpc.StatusCode.NOT_FOUND:
                return EtcdLeaseGone(text)
            case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE | grpc.StatusCode.UNIMPLEMENTED:
                return Rejected(Reason(kind=ReasonKind.INVALID, text=text))
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return EtcdUnavailable(f"etcd at {rpc.address} did not answer in time", self._retry_ms)
            case _:
                return EtcdUnavailable(text, self._retry_ms)


def _token_is_stale(error: grpc.aio.AioRpcError) -> bool:
    details = error.details() or ""
    # A restarted member forgets simple tokens; a change of users or roles makes older ones invalid.
    return "invalid auth token" in details or "revision of auth store is old" in details


def _is_denial(error: grpc.aio.AioRpcError) -> bool:
    if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return True
    details = error.details() or ""
    return any(
        sign in details
        for sign in (
            "authentication failed",
            "user name is empty",
            "revision of auth store is old",
            "CERTIFICATE_VERIFY_FAILED",
        )
    )


def _addresses(options: EtcdOptions) -> list[str]:
    if not options.endpoints:
        raise invalid("etcd: no endpoint given")
    return [endpoint.removeprefix("https://").removeprefix("http://").rstrip("/") for endpoint in options.endpoints]


def _credentials(options: EtcdOptions) -> grpc.ChannelCredentials | None:
    if (options.cert is None) != (options.key is None):
        raise invalid("etcd: cert and key belong together")
    if options.ca is None:
        if options.cert is not None or any(endpoint.startswith("https://") for endpoint in options.endpoints):
            raise invalid("etcd: TLS needs the CA certificate that signed the server's (ca)")
        return None
    try:
        cert = options.cert.read_bytes() if options.cert else None
        key = options.key.read_bytes() if options.key else None
        return tls_credentials(options.ca.read_bytes(), cert, key)
    except OSError as error:
        raise invalid(f"etcd: cannot read {error.filename}: {error.strerror}") from error


def _channel_options(timings: Timings) -> GrpcOptions:
    """Unlike the cluster's own channels: etcd answers fast pings, and pings without calls, with too_many_pings. Call
    deadlines do the noticing."""
    silence_ms = round(timings.session_silence * 1000)
    return [
        ("grpc.keepalive_time_ms", round(ETCD_CLIENT_KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", silence_ms),
        ("grpc.http2.ping_timeout_ms", silence_ms),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Bounds one attempt to connect, TLS handshake included.
        ("grpc.min_reconnect_backoff_ms", silence_ms),
        ("grpc.max_reconnect_backoff_ms", max(100, round(timings.reconnect_max * 1000))),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ]
