"""The modelled etcd behind etcd's own gRPC services, for the real EtcdClient."""
# etcd3aio's protobuf types carry no types.
# pyright: basic

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from etcd3aio import _protobuf

from controlplane.runtime.errors import PerdureError
from controlplane.runtime.etcd_types import (
    Compare,
    Delete,
    EtcdLeaseGone,
    Get,
    KeyValue,
    Op,
    Put,
    Target,
    Txn,
)
from tools.sim.etcd import Change, Etcd
from tools.sim.shells.wires import Context, Server

ADDRESS = "etcd:1"
pb: Any = _protobuf.rpc_pb2  # pyright: ignore[reportPrivateImportUsage]
kv_pb2: Any = _protobuf.kv_pb2  # pyright: ignore[reportPrivateImportUsage]
_TARGETS = {
    pb.Compare.VALUE: (Target.VALUE, "value"),
    pb.Compare.CREATE: (Target.CREATE_REVISION, "create_revision"),
    pb.Compare.MOD: (Target.MOD_REVISION, "mod_revision"),
    pb.Compare.VERSION: (Target.VERSION, "version"),
}


class EtcdServer:
    """Its services on `server`."""

    def __init__(self, etcd: Etcd, server: Server) -> None:
        self._etcd = etcd
        self._server = server
        unary = {
            "KV": {"Range": (self._range, pb.RangeRequest), "Txn": (self._txn, pb.TxnRequest)},
            "Lease": {
                "LeaseGrant": (self._grant, pb.LeaseGrantRequest),
                "LeaseRevoke": (self._revoke, pb.LeaseRevokeRequest),
                "LeaseTimeToLive": (self._remaining, pb.LeaseTimeToLiveRequest),
            },
        }
        for service, methods in unary.items():
            handlers = {name: _unary(serve, request) for name, (serve, request) in methods.items()}
            server.add_registered_method_handlers(f"etcdserverpb.{service}", handlers)
        server.add_registered_method_handlers(
            "etcdserverpb.Lease", {"LeaseKeepAlive": _stream(self._keepalive, pb.LeaseKeepAliveRequest)}
        )
        server.add_registered_method_handlers("etcdserverpb.Watch", {"Watch": _stream(self._watch, pb.WatchRequest)})
        server.add_insecure_port(ADDRESS)

    # ------------------------------------------------------------ calls

    def _range(self, request: Any) -> Any:
        prefix = request.key.decode()
        if request.range_end:
            snapshot = self._etcd.get_prefix(prefix)
            return pb.RangeResponse(header=self._header(), kvs=[_kv(item) for item in snapshot.items])
        item = self._etcd.content.keys.get(prefix)
        return pb.RangeResponse(header=self._header(), kvs=[_kv(item)] if item is not None else [])

    def _txn(self, request: Any) -> Any:
        when = tuple(_compare(one) for one in request.compare)
        txn = Txn(when=when, success=tuple(map(_op, request.success)), failure=tuple(map(_op, request.failure)))
        result = self._etcd.txn(txn)
        reads = iter(result.reads)
        responses: list[Any] = []
        for op in txn.success if result.succeeded else txn.failure:
            if isinstance(op, Get):
                item = next(reads)
                found = pb.RangeResponse(kvs=[_kv(item)] if item is not None else [])
                responses.append(pb.ResponseOp(response_range=found))
            else:
                responses.append(pb.ResponseOp(response_put=pb.PutResponse()))
        return pb.TxnResponse(header=self._header(), succeeded=result.succeeded, responses=responses)

    def _grant(self, request: Any) -> Any:
        lease, ttl = self._etcd.grant(request.TTL)
        return pb.LeaseGrantResponse(header=self._header(), ID=lease, TTL=ttl)

    def _revoke(self, request: Any) -> Any:
        if request.ID not in self._etcd.content.leases:
            raise EtcdLeaseGone(f"lease {request.ID}")
        self._etcd.revoke(request.ID)
        return pb.LeaseRevokeResponse(header=self._header())

    def _remaining(self, request: Any) -> Any:
        return pb.LeaseTimeToLiveResponse(header=self._header(), ID=request.ID, TTL=self._etcd.remaining(request.ID))

    # ------------------------------------------------------------ streams

    async def _keepalive(self, requests: AsyncIterator[Any], context: Context) -> None:
        async for request in requests:
            await self._lag()
            ttl = self._etcd.keepalive(request.ID)
            await context.write(pb.LeaseKeepAliveResponse(header=self._header(), ID=request.ID, TTL=ttl))

    async def _watch(self, requests: AsyncIterator[Any], context: Context) -> None:
        """One watch a stream, as the client makes them."""
        create = (await anext(requests)).create_request
        news: deque[tuple[int, tuple[Change, ...]]] = deque()
        woken = asyncio.Event()
        over: list[bool] = []

        def changed(revision: int, changes: tuple[Change, ...]) -> None:
            news.append((revision, changes))
            woken.set()

        def ended() -> None:
            over.append(True)
            woken.set()

        await context.write(pb.WatchResponse(header=self._header(), created=True))
        try:
            number = self._etcd.watch(create.key.decode(), create.start_revision, changed, ended)
        except PerdureError as error:
            await context.write(pb.WatchResponse(header=self._header(), canceled=True, cancel_reason=str(error)))
            return
        asked = asyncio.create_task(self._answer_progress(requests, context))
        try:
            while not over:
                while news:
                    revision, changes = news.popleft()
                    events = [_event(revision, change) for change in changes]
                    await context.write(pb.WatchResponse(header=self._header(), events=events))
                woken.clear()
                await woken.wait()
        finally:
            self._etcd.unwatch(number)
            asked.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the watch ended")

    async def _answer_progress(self, requests: AsyncIterator[Any], context: Context) -> None:
        async for _ in requests:
            await context.write(pb.WatchResponse(header=self._header()))

    async def _lag(self) -> None:
        await asyncio.sleep(self._etcd.delay_s * self._etcd.kernel.random.random())

    def _header(self) -> Any:
        return pb.ResponseHeader(revision=self._etcd.content.revision)

    # ------------------------------------------------------------ plumbing

    async def answer(self, serve: Callable[[Any], Any], request: Any, context: Context) -> Any:
        """Serve one call; what etcd refuses becomes a status."""
        await self._lag()
        try:
            return serve(request)
        except EtcdLeaseGone as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except PerdureError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))


def _unary(serve: Any, request: Any) -> Any:
    server: EtcdServer = serve.__self__
    return grpc.unary_unary_rpc_method_handler(
        lambda asked, context: server.answer(serve, asked, context),
        request_deserializer=request.FromString,
        response_serializer=_serialize,
    )


def _stream(serve: Any, request: Any) -> Any:
    return grpc.stream_stream_rpc_method_handler(
        serve, request_deserializer=request.FromString, response_serializer=_serialize
    )


def _serialize(message: Any) -> bytes:
    return message.SerializeToString()


def _kv(item: KeyValue) -> Any:
    return kv_pb2.KeyValue(
        key=item.key.encode(),
        value=item.value,
        create_revision=item.create_revision,
        mod_revision=item.mod_revision,
        version=item.version,
        lease=item.lease,
    )


def _event(revision: int, change: Change) -> Any:
    key, item = change
    if item is None:
        return kv_pb2.Event(type=kv_pb2.Event.DELETE, kv=kv_pb2.KeyValue(key=key.encode(), mod_revision=revision))
    return kv_pb2.Event(type=kv_pb2.Event.PUT, kv=_kv(item))


def _compare(compare: Any) -> Compare:
    target, field = _TARGETS[compare.target]
    return Compare(compare.key.decode(), target, getattr(compare, field))


def _op(op: Any) -> Op:
    match op.WhichOneof("request"):
        case "request_range":
            return Get(op.request_range.key.decode())
        case "request_put":
            put = op.request_put
            return Put(put.key.decode(), put.value, put.lease)
        case _:
            return Delete(op.request_delete_range.key.decode())
