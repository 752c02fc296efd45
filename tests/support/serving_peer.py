"""Real gRPC peers of a gateway: a leader that routes, and workers that answer from a deterministic source of tokens.

They speak the whole protocol over real sockets and compute nothing: token i = f(prompt, seed, i). So a test knows what
every client must have received, whatever broke on the way.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc.aio

from controlplane.runtime.ids import (
    ClusterId,
    DeploymentId,
    Epoch,
    Incarnation,
    NodeId,
    ReplicaId,
    SessionId,
    Slot,
    Term,
    draw_id,
)
from controlplane.runtime.messages.common import Capacity, Head, Permit, Reason, ReasonKind, ReplicaPhase
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
from controlplane.runtime.messages.serve import (
    Admitted,
    CancelSlots,
    EndRequests,
    Finish,
    FinishReason,
    OpenCode,
    OpenRefused,
    OpenRequest,
    ServeHeartbeat,
    ServeHello,
    SlotsLost,
    StepTokens,
    SyncReply,
    SyncSlots,
    TokenLogprobs,
)
from controlplane.runtime.packing import pack_f32, pack_u32, unpack_u32
from controlplane.runtime.timing import Timings, server_options
from controlplane.runtime.wire import ROUTE_DOWN, ROUTE_UP, SERVE_DOWN, SERVE_UP
from protos.perdure.v1 import route_pb2_grpc, serve_pb2_grpc

CLUSTER = ClusterId("c" * 32)
DEPLOYMENT = DeploymentId("demo")
MODEL = "tiny"


def token_at(prompt: bytes, seed: int, index: int, vocab: int) -> int:
    """The source: never a special token, which are the first ten ids."""
    digest = hashlib.blake2b(prompt + seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=4).digest()
    return 10 + int.from_bytes(digest, "little") % (vocab - 10)


def reference(prompt: bytes, seed: int, count: int, vocab: int) -> list[int]:
    return [token_at(prompt, seed, index, vocab) for index in range(count)]


@dataclass
class Sequence:
    """One choice at a worker."""

    open: OpenRequest
    slot: Slot
    seed: int
    tokens: array[int]
    sent: int
    prompt_sent: bool = False
    finished: bool = False
    finish_sent: bool = False


class WorkerPeer(serve_pb2_grpc.ServingServicer):
    """One worker daemon with one replica on it."""

    def __init__(self, name: str, vocab: int, timings: Timings, step_s: float = 0.002) -> None:
        self.name = NodeId(name)
        self.replica = ReplicaId(f"{name}-replica")
        self.epoch = Epoch(1)
        self.vocab = vocab
        self.timings = timings
        self.step_s = step_s
        self.address = ""
        self.sequences: dict[Slot, Sequence] = {}
        self.opened: list[OpenRequest] = []
        self.cancelled: list[Slot] = []
        self.ended: list[str] = []
        self.synced: list[SyncSlots] = []
        self.refuse_with: OpenCode | None = None
        self.silent = False
        # Streams end after this many step messages, once.
        self.break_after_steps: int | None = None
        self.steps_sent = 0
        self._server: grpc.aio.Server | None = None
        self._streams: set[asyncio.Queue[Any]] = set()

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=server_options(self.timings))
        serve_pb2_grpc.add_ServingServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()

    async def kill(self) -> None:
        """The process dies: streams break, the port refuses, everything is forgotten."""
        if self._server is None:
            return
        self.sequences.clear()
        server, self._server = self._server, None
        await server.stop(None)

    def break_streams(self) -> None:
        """Only the connection breaks: sequences stay, the port accepts."""
        for stream in self._streams:
            stream.put_nowait(None)

    def lose(self, *, suspect: bool) -> None:
        """The rank dies under a living daemon."""
        slots = tuple(self.sequences)
        self.sequences.clear()
        reason = Reason(kind=ReasonKind.PROCESS_EXITED, text=f"rank of {self.name} was killed", node=self.name)
        for stream in self._streams:
            stream.put_nowait(SlotsLost(slots=slots, reason=reason, suspect=suspect))

    @property
    def row(self) -> ReplicaRow:
        return ReplicaRow(
            replica=self.replica,
            epoch=self.epoch,
            phase=ReplicaPhase.READY,
            node=self.name,
            serve_address=self.address,
            deployment=DEPLOYMENT,
            capacity=Capacity(
                total_blocks=1000, block_tokens=16, max_sequences=64, max_batch_tokens=2048, max_model_tokens=512
            ),
            model_path="",
            model=MODEL,
            numerics="exact",
        )

    async def Serve(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._streams.add(outbox)
        reader = asyncio.create_task(self._read(request_iterator, outbox))
        beats = asyncio.create_task(self._beat(outbox))
        steps = asyncio.create_task(self._step(outbox))
        try:
            while (body := await outbox.get()) is not None:
                yield SERVE_DOWN.encode(body)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
        finally:
            self._streams.discard(outbox)
            for task in (reader, beats, steps):
                task.cancel()

    async def _beat(self, outbox: asyncio.Queue[Any]) -> None:
        while True:
            await asyncio.sleep(self.timings.heartbeat_interval)
            if not self.silent:
                outbox.put_nowait(ServeHeartbeat(highest_term_seen=Term(0)))

    async def _read(self, frames: AsyncIterator[Any], outbox: asyncio.Queue[Any]) -> None:
        async for frame in frames:
            match SERVE_UP.decode(frame):
                case ServeHello():
                    outbox.put_nowait(
                        ServeHello(
                            cluster=CLUSTER,
                            name=self.name,
                            incarnation=Incarnation(draw_id()),
                            highest_term_seen=Term(0),
                            leader_address="",
                            heartbeat_interval_ms=round(self.timings.heartbeat_interval * 1000),
                        )
                    )
                case OpenRequest() as body:
                    self._open(body, outbox)
                case SyncSlots() as sync:
                    self._sync(sync, outbox)
                case CancelSlots(slots=slots):
                    self.cancelled += slots
                    for slot in slots:
                        self.sequences.pop(slot, None)
                case EndRequests(requests=requests):
                    self.ended += requests
                    for slot, sequence in list(self.sequences.items()):
                        if sequence.open.permit.request in requests:
                            del self.sequences[slot]
                case other:
                    raise AssertionError(f"unexpected {other}")

    def _open(self, body: OpenRequest, outbox: asyncio.Queue[Any]) -> None:
        permit = body.permit
        if self.refuse_with is not None or permit.epoch != self.epoch:
            code = self.refuse_with or OpenCode.STALE_EPOCH
            reason = Reason(kind=ReasonKind.OVERLOADED, text=f"refused as {code.name}")
            outbox.put_nowait(OpenRefused(request=permit.request, attempt=permit.attempt, code=code, reason=reason))
            return
        self.opened.append(body)
        for choice in body.choices:
            if not choice.finished:
                tokens = unpack_u32(choice.delivered)
                self.sequences[choice.slot] = Sequence(body, choice.slot, choice.seed, tokens, len(tokens))
        outbox.put_nowait(Admitted(request=permit.request, attempt=permit.attempt))

    def _sync(self, sync: SyncSlots, outbox: asyncio.Queue[Any]) -> None:
        self.synced.append(sync)
        known = [cursor for cursor in sync.slots if cursor.slot in self.sequences]
        for cursor in known:
            sequence = self.sequences[cursor.slot]
            sequence.sent, sequence.finish_sent, sequence.prompt_sent = cursor.next_index, False, False
        found = {cursor.slot for cursor in known}
        unknown = tuple(cursor.slot for cursor in sync.slots if cursor.slot not in found)
        outbox.put_nowait(SyncReply(known=tuple(found), unknown=unknown))

    async def _step(self, outbox: asyncio.Queue[Any]) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if self.silent:
                continue
            message = self._one_step()
            if message is not None:
                self.steps_sent += 1
                outbox.put_nowait(message)
            if self.break_after_steps is not None and self.steps_sent >= self.break_after_steps:
                self.break_after_steps = None
                self.break_streams()

    def _one_step(self) -> StepTokens | None:
        slots, first, counts, tokens = array("I"), array("I"), array("I"), array("I")
        logprobs: list[TokenLogprobs] = []
        finishes: list[Finish] = []
        for sequence in self.sequences.values():
            self._advance(sequence)
            fresh = sequence.tokens[sequence.sent :]
            done = sequence.finished and not sequence.finish_sent
            if not fresh and not done:
                continue
            slots.append(sequence.slot)
            first.append(sequence.sent)
            counts.append(len(fresh))
            tokens.extend(fresh)
            logprobs += _logprobs(sequence, fresh)
            sequence.sent = len(sequence.tokens)
            sequence.prompt_sent = True
            if done:
                sequence.finish_sent = True
                finishes.append(_finish(sequence))
        if not slots:
            return None
        return StepTokens(
            slots=pack_u32(slots),
            first_index=pack_u32(first),
            counts=pack_u32(counts),
            tokens=pack_u32(tokens),
            logprobs=tuple(logprobs),
            finish=tuple(finishes),
        )

    def _advance(self, sequence: Sequence) -> None:
        sampling = sequence.open.sampling
        if not sequence.finished and len(sequence.tokens) < sampling.max_tokens:
            token = token_at(sequence.open.prompt, sequence.seed, len(sequence.tokens), self.vocab)
            sequence.tokens.append(token)
        stopped = len(sequence.tokens) > 0 and sequence.tokens[-1] in sampling.stop_ids
        sequence.finished = stopped or len(sequence.tokens) >= sampling.max_tokens


def _finish(sequence: Sequence) -> Finish:
    last = sequence.tokens[-1]
    if last in sequence.open.sampling.stop_ids:
        return Finish(slot=sequence.slot, reason=FinishReason.STOP, stop_id=last)
    return Finish(slot=sequence.slot, reason=FinishReason.LENGTH)


def logprob_of(token: int) -> float:
    return -0.5 - (token % 8) / 8


def _logprobs(sequence: Sequence, fresh: array[int]) -> list[TokenLogprobs]:
    sampling = sequence.open.sampling
    found: list[TokenLogprobs] = []
    if sampling.prompt_logprobs is not None and not sequence.prompt_sent:
        prompt = unpack_u32(sequence.open.prompt)
        found += [
            _entry(sequence.slot, index, prompt[index], sampling.prompt_logprobs, prompt=True)
            for index in range(1, len(prompt))
        ]
    if sampling.logprobs is not None:
        found += [
            _entry(sequence.slot, sequence.sent + place, token, sampling.logprobs, prompt=False)
            for place, token in enumerate(fresh)
        ]
    return found


def _entry(slot: Slot, index: int, token: int, count: int, *, prompt: bool) -> TokenLogprobs:
    top = [token + step for step in range(count)]
    return TokenLogprobs(
        slot=slot,
        index=index,
        chosen=logprob_of(token),
        chosen_rank=1,
        top_ids=pack_u32(top),
        top_values=pack_f32(logprob_of(other) for other in top),
        prompt=prompt,
    )


@dataclass
class _Session:
    hello: GatewayHello
    outbox: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)


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

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
