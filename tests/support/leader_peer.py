"""A leading coordinator that speaks the whole of Route and decides nothing but whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio

from controlplane.runtime.ids import (
    Epoch,
    Incarnation,
    SessionId,
    Term,
)
from controlplane.runtime.messages.common import Head, Permit, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import (
    EndBatch,
    EndEntry,
    GatewayHello,
    GatewayWelcome,
    Inventory,
    JournalPhase,
    LeaderHeartbeat,
    ReplicaClosed,
    ReplicaEpoch,
    ReplicaRow,
    ReplicaTable,
    RouteBatch,
    RouteCode,
    Routed,
    RoutedBatch,
    RouteEntry,
    RouteRefused,
)
from controlplane.runtime.timing import Timings, server_options
from controlplane.runtime.wire import ROUTE_DOWN, ROUTE_UP
from protos.perdure.v1 import route_pb2_grpc
from tests.support.serving_peer import CLUSTER, WorkerPeer


class LeaderPeer(route_pb2_grpc.RoutingServicer):
    """A leading coordinator that routes to the next worker that is not excluded."""

    def __init__(self, timings: Timings, model_path: str, term: int = 1) -> None:
        self.timings = timings
        self.model_path = model_path
        self.term = Term(term)
        self.address = ""
        self.workers: list[WorkerPeer] = []
        self.asked: list[RouteEntry] = []
        self.ends: list[EndEntry] = []
        self.inventories: list[Inventory] = []
        self.refuse_with: RouteCode | None = None
        self.mute = False
        self.sessions: set[asyncio.Queue[Any]] = set()
        self._turn = 0
        self._minted = 0
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=server_options(self.timings))
        route_pb2_grpc.add_RoutingServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()

    async def kill(self) -> None:
        if self._server is None:
            return
        server, self._server = self._server, None
        await server.stop(None)

    def tell(self, body: Any) -> None:
        for outbox in self.sessions:
            outbox.put_nowait(body)

    def close_replica(self, worker: WorkerPeer, *, suspects: tuple[Any, ...] = ()) -> None:
        """The replica's epoch is over; the next one is READY at once."""
        reason = Reason(kind=ReasonKind.PROCESS_EXITED, text=f"a rank of {worker.replica} exited")
        self.tell(ReplicaClosed(replica=worker.replica, epoch=worker.epoch, reason=reason, suspects=suspects))
        worker.epoch = Epoch(worker.epoch + 1)
        self.tell(ReplicaTable(full=False, rows=(self._row(worker),)))

    def remove(self, worker: WorkerPeer) -> None:
        self.workers.remove(worker)
        self.tell(ReplicaTable(full=False, rows=(replace(self._row(worker), phase=ReplicaPhase.CLOSED),)))

    def _row(self, worker: WorkerPeer) -> ReplicaRow:
        return replace(worker.row, model_path=self.model_path)

    async def Route(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        hello = ROUTE_UP.decode(await anext(request_iterator))
        assert isinstance(hello, GatewayHello)
        assert hello.cluster == CLUSTER
        outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._minted += 1
        session = SessionId(self._minted)
        outbox.put_nowait(GatewayWelcome(term=self.term, session=session, timing=self.timings.to_spec()))
        outbox.put_nowait(ReplicaTable(full=True, rows=tuple(self._row(worker) for worker in self.workers)))
        self.sessions.add(outbox)
        tasks = [
            asyncio.create_task(self._read(request_iterator, outbox)),
            asyncio.create_task(self._beat(outbox)),
        ]
        seq = 0
        try:
            while True:
                body = await outbox.get()
                seq += 1
                yield ROUTE_DOWN.encode(body, Head(term=self.term, session=session, seq=seq))
        finally:
            self.sessions.discard(outbox)
            for task in tasks:
                task.cancel()

    async def _beat(self, outbox: asyncio.Queue[Any]) -> None:
        while True:
            await asyncio.sleep(self.timings.heartbeat_interval)
            if not self.mute:
                outbox.put_nowait(LeaderHeartbeat())

    async def _read(self, frames: AsyncIterator[Any], outbox: asyncio.Queue[Any]) -> None:
        seq = 1
        async for frame in frames:
            seq += 1
            assert frame.head.seq == seq, "frames are numbered without gaps"
            match ROUTE_UP.decode(frame):
                case RouteBatch(entries=entries):
                    outbox.put_nowait(self._route(entries))
                case Inventory() as inventory:
                    self.inventories.append(inventory)
                    waiting = [info.entry for info in inventory.journals if info.phase == JournalPhase.ROUTING]
                    if waiting:
                        outbox.put_nowait(self._route(tuple(waiting)))
                case EndBatch(entries=entries):
                    self.ends += entries
                case _:
                    pass

    def _route(self, entries: tuple[RouteEntry, ...]) -> RoutedBatch:
        self.asked += entries
        answers = [self._answer(entry) for entry in entries]
        return RoutedBatch(
            routed=tuple(answer for answer in answers if isinstance(answer, Routed)),
            refused=tuple(answer for answer in answers if isinstance(answer, RouteRefused)),
        )

    def _answer(self, entry: RouteEntry) -> Routed | RouteRefused:
        allowed = [
            worker
            for worker in self.workers
            if ReplicaEpoch(replica=worker.replica, epoch=worker.epoch) not in entry.exclude
        ]
        code = self.refuse_with if self.refuse_with is not None else (None if allowed else RouteCode.NO_REPLICA)
        if code is not None:
            return RouteRefused(
                request=entry.request,
                attempt=entry.attempt,
                code=code,
                reason=Reason(kind=ReasonKind.NO_CAPACITY, text=f"refused as {code.name}"),
                retry_ms=50,
            )
        worker = allowed[self._turn % len(allowed)]
        self._turn += 1
        permit = Permit(
            request=entry.request,
            attempt=entry.attempt,
            replica=worker.replica,
            epoch=worker.epoch,
            term=self.term,
            solo=entry.crashes > 0,
            priority=entry.priority,
        )
        return Routed(permit=permit, serve_address=worker.address, node=worker.name)


class LeaderBook:
    """Tells a gateway who leads, as a watch on etcd would."""

    def __init__(self) -> None:
        self.addresses: tuple[str, ...] = ()
        self.highest_term = Term(0)
        self._changed = asyncio.Event()

    def set(self, address: str, term: int) -> None:
        self.addresses = (address,) if address else ()
        self.highest_term = Term(max(self.highest_term, term))
        self._notify()

    async def changed(self) -> None:
        await self._changed.wait()

    def hint(self, address: str, term: Term) -> None:
        if term > self.highest_term:
            self.highest_term = term
            if address:
                self.addresses = (address,)
            self._notify()

    def meet(self, term: Term, incarnation: Incarnation) -> None:
        """No term is led twice here."""

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
