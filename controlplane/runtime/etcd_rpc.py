"""One etcd endpoint: its channel, and its calls over etcd3aio's generated stubs.

Generated types stop here. Calls raise grpc.aio.AioRpcError; EtcdClient maps it.
"""
# The stubs carry no types.
# pyright: basic

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from etcd3aio import _protobuf as pb
from grpc.aio import EOF  # pyright: ignore[reportAttributeAccessIssue]

from controlplane.runtime.etcd_types import (
    Compare,
    Delete,
    EtcdAlarm,
    EtcdMember,
    EtcdStatus,
    Get,
    KeyValue,
    Lease,
    Op,
    Put,
    Snapshot,
    Target,
    Txn,
    TxnResult,
)
from controlplane.runtime.timing import GrpcOptions

Metadata = tuple[tuple[str, str], ...]

_TARGETS = {
    Target.VALUE: pb.Compare.VALUE,
    Target.CREATE_REVISION: pb.Compare.CREATE,
    Target.MOD_REVISION: pb.Compare.MOD,
    Target.VERSION: pb.Compare.VERSION,
}
_ALARMS = {1: "NOSPACE", 2: "CORRUPT"}


@dataclass(frozen=True, slots=True)
class CallOptions:
    """`timeout` in seconds bounds the call on the wire; None for a stream."""

    metadata: Metadata
    timeout: float | None

    def keywords(self) -> dict[str, Any]:
        return {"metadata": self.metadata, "timeout": self.timeout}


@dataclass(frozen=True, slots=True)
class WatchMessage:
    """One answer on a watch stream. `revision` is the store's when it was sent."""

    revision: int
    # Revision, key and its new state, None for a deletion; oldest first.
    changes: tuple[tuple[int, str, KeyValue | None], ...]
    created: bool
    # Why etcd ended the watch; None while it goes on.
    cancelled: str | None


class EtcdRpc:
    """Calls to one endpoint. Connects lazily and by itself."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None, options: GrpcOptions) -> None:
        self.address = address
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._kv = pb.KVStub(self._channel)
        self._lease = pb.LeaseStub(self._channel)
        self._watch = pb.WatchStub(self._channel)
        self._auth = pb.AuthStub(self._channel)
        self._maintenance = pb.MaintenanceStub(self._channel)
        self._cluster = pb.ClusterStub(self._channel)

    async def close(self) -> None:
        await self._channel.close(None)

    async def authenticate(self, user: str, password: str, call: CallOptions) -> str:
        """A token for the calls' metadata."""
        reply = await self._auth.Authenticate(pb.AuthenticateRequest(name=user, password=password), **call.keywords())
        return reply.token

    async def range(self, start: bytes, end: bytes, call: CallOptions) -> Snapshot:
        """Linearizable read of one key (`end` empty) or of [start, end)."""
        reply = await self._kv.Range(pb.RangeRequest(key=start, range_end=end), **call.keywords())
        return Snapshot(reply.header.revision, tuple(_key_value(item) for item in reply.kvs))

    async def txn(self, txn: Txn, call: CallOptions) -> TxnResult:
        reply = await self._kv.Txn(
            pb.TxnRequest(
                compare=[_compare(compare) for compare in txn.when],
                success=[_op(op) for op in txn.success],
                failure=[_op(op) for op in txn.failure],
            ),
            **call.keywords(),
        )
        ranges = [item.response_range.kvs for item in reply.responses if item.HasField("response_range")]
        return TxnResult(
            reply.succeeded, reply.header.revision, tuple(_key_value(kvs[0]) if kvs else None for kvs in ranges)
        )

    async def delete_range(self, start: bytes, end: bytes, call: CallOptions) -> int:
        """Number of keys deleted."""
        reply = await self._kv.DeleteRange(pb.DeleteRangeRequest(key=start, range_end=end), **call.keywords())
        return reply.deleted

    async def compact(self, revision: int, call: CallOptions) -> None:
        await self._kv.Compact(pb.CompactionRequest(revision=revision, physical=True), **call.keywords())

    async def lease_grant(self, ttl: int, call: CallOptions) -> Lease:
        reply = await self._lease.LeaseGrant(pb.LeaseGrantRequest(TTL=ttl), **call.keywords())
        return Lease(reply.ID, reply.TTL)

    async def lease_keepalive(self, lease: int, call: CallOptions) -> int | None:
        """The renewed TTL; 0 if etcd does not know the lease; None if the stream ended unanswered."""
        stream = self._lease.LeaseKeepAlive([pb.LeaseKeepAliveRequest(ID=lease)], **call.keywords())
        try:
            reply = await stream.read()
            return None if reply is EOF else reply.TTL
        finally:
            stream.cancel()

    async def lease_revoke(self, lease: int, call: CallOptions) -> None:
        await self._lease.LeaseRevoke(pb.LeaseRevokeRequest(ID=lease), **call.keywords())

    async def lease_remaining(self, lease: int, call: CallOptions) -> int:
        """Seconds until the lease expires; -1 if etcd does not know it."""
        reply = await self._lease.LeaseTimeToLive(pb.LeaseTimeToLiveRequest(ID=lease), **call.keywords())
        return reply.TTL

    async def status(self, call: CallOptions) -> EtcdStatus:
        reply = await self._maintenance.Status(pb.StatusRequest(), **call.keywords())
        return EtcdStatus(
            endpoint=self.address,
            version=reply.version,
            member=reply.header.member_id,
            leader=reply.leader,
            revision=reply.header.revision,
            errors=tuple(reply.errors),
        )

    async def members(self, call: CallOptions) -> tuple[EtcdMember, ...]:
        reply = await self._cluster.MemberList(pb.MemberListRequest(), **call.keywords())
        return tuple(
            EtcdMember(item.ID, item.name, tuple(item.peerURLs), tuple(item.clientURLs)) for item in reply.members
        )

    async def alarms(self, call: CallOptions) -> tuple[EtcdAlarm, ...]:
        reply = await self._maintenance.Alarm(pb.AlarmRequest(), **call.keywords())
        return tuple(
            EtcdAlarm(item.memberID, _ALARMS.get(item.alarm, f"alarm {item.alarm}"))
            for item in reply.alarms
            if item.alarm
        )

    def watch(self, call: CallOptions) -> WatchStream:
        """A watch stream, to be begun with `create`."""
        return WatchStream(self._watch.Watch(**call.keywords()))


class WatchStream:
    """One Watch call that carries one watch."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def create(self, start: bytes, end: bytes, revision: int) -> None:
        """Watch [start, end) from `revision` on."""
        request = pb.WatchCreateRequest(key=start, range_end=end, start_revision=revision, progress_notify=True)
        await self._write(pb.WatchRequest(create_request=request))

    async def ask_progress(self) -> None:
        """Ask for an answer that carries the store's revision even if nothing changed."""
        await self._write(pb.WatchRequest(progress_request={}))

    async def read(self) -> WatchMessage:
        """The next answer. An ended stream reads as a cancelled watch."""
        reply = await self._call.read()
        if reply is EOF:
            return WatchMessage(0, (), created=False, cancelled="stream ended")
        cancelled = None
        if reply.canceled:
            compacted = f"compacted at revision {reply.compact_revision}" if reply.compact_revision else ""
            cancelled = reply.cancel_reason or compacted or "no reason given"
        return WatchMessage(
            revision=reply.header.revision,
            changes=tuple(_change(event) for event in reply.events),
            created=reply.created,
            cancelled=cancelled,
        )

    def cancel(self) -> None:
        self._call.cancel()

    async def _write(self, request: Any) -> None:
        # A call that has ended says why when it is read.
        with suppress(asyncio.InvalidStateError):
            await self._call.write(request)


def _key_value(item: Any) -> KeyValue:
    return KeyValue(
        key=item.key.decode(),
        value=item.value,
        create_revision=item.create_revision,
        mod_revision=item.mod_revision,
        version=item.version,
        lease=item.lease,
    )


def _change(event: Any) -> tuple[int, str, KeyValue | None]:
    deleted = event.type == event.DELETE
    return event.kv.mod_revision, event.kv.key.decode(), None if deleted else _key_value(event.kv)


def _compare(compare: Compare) -> Any:
    return pb.Compare(
        key=compare.key.encode(),
        target=_TARGETS[compare.target],
        result=pb.Compare.EQUAL,
        **{compare.target.value: compare.operand},
    )


def _op(op: Op) -> Any:
    match op:
        case Get(key):
            return pb.RequestOp(request_range=pb.RangeRequest(key=key.encode()))
        case Put(key, value, lease):
            return pb.RequestOp(request_put=pb.PutRequest(key=key.encode(), value=value, lease=lease))
        case Delete(key):
            return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key.encode()))


def tls_credentials(ca: bytes, cert: bytes | None, key: bytes | None) -> grpc.ChannelCredentials:
    """Verify etcd against `ca` (PEM); with `cert` and `key`, show it a certificate of ours."""
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
