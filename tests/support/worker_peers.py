"""Both peers of a worker daemon, played from a test over real gRPC: the leader, and a gateway."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc.aio

from controlplane.runtime.ids import (
    Attempt,
    ClusterId,
    DeploymentId,
    Epoch,
    GatewayId,
    Incarnation,
    NodeId,
    ReplicaId,
    RequestId,
    SessionId,
    Slot,
    Term,
    draw_id,
)
from controlplane.runtime.messages.common import Head, Member, Permit, Reason, ReasonKind, ReplicaSpec, Sampling
from controlplane.runtime.messages.serve import (
    Choice,
    Finish,
    OpenRequest,
    ServeDown,
    ServeHello,
    ServeUp,
    StepTokens,
)
from controlplane.runtime.messages.session import (
    AbortGroup,
    AttachDown,
    AttachUp,
    FormGroup,
    GroupPhase,
    GroupState,
    LoadReplica,
    PrepareGroup,
    RankInfo,
    RankState,
    WorkerHello,
    WorkerSnapshot,
    WorkerWelcome,
)
from controlplane.runtime.messages.weights import WeightSource
from controlplane.runtime.packing import pack_u32, unpack_u32
from controlplane.runtime.records import LeaderRecord
from controlplane.runtime.timing import channel_options, derive_timings, server_options
from controlplane.runtime.wire import ATTACH_DOWN, ATTACH_UP, SERVE_DOWN, SERVE_UP
from protos.perdure.v1 import serve_pb2_grpc, session_pb2_grpc
from tests.support.cluster import eventually
from tests.support.rank_process import expected_tokens

T = TypeVar("T")

CLUSTER = ClusterId("c" * 32)
TIMINGS = derive_timings()
REPLICA = ReplicaId("tiny-0")
SPEC = ReplicaSpec(deployment=DeploymentId("tiny"), model_path="nowhere")
PROMPT = [1, 2, 3]
EXPECTED = expected_tokens(pack_u32(PROMPT), 7, 4000)
"""Tokens that a gateway's request for the prompt gets, however many it asks for."""


# ---------------------------------------------------------------- the leader


def abort(epoch: Epoch, kind: ReasonKind = ReasonKind.NO_PROGRESS) -> AbortGroup:
    return AbortGroup(replica=REPLICA, epoch=epoch, reason=Reason(kind=kind, text="the test says so"))


class PlayedLeader:
    """Answers Attach, keeps what workers say, sends what the test wants."""

    def __init__(self, term: int = 1) -> None:
        self.term = Term(term)
        self.port = 0
        self.hellos: list[WorkerHello] = []
        self.said: list[AttachUp] = []
        self.heads: list[Head] = []
        self.ended = 0
        self._sessions = 0
        self._epochs: dict[ReplicaId, int] = defaultdict(int)
        self._call: Any = None
        self._sent = 0
        self._server = grpc.aio.server(options=server_options(TIMINGS))

    @property
    def record(self) -> LeaderRecord:
        return LeaderRecord(
            name="played",
            incarnation=Incarnation(draw_id()),
            term=self.term,
            address=f"127.0.0.1:{self.port}",
            pid=os.getpid(),
        )

    async def start(self) -> None:
        session_pb2_grpc.add_SessionServicer_to_server(_Session(self), self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    async def attach(self, frames: AsyncIterator[Any], context: Any) -> None:
        async for frame in frames:
            body = ATTACH_UP.decode(frame)
            if isinstance(body, WorkerHello):
                self.hellos.append(body)
                self._sessions += 1
                self._call, self._sent = context, 0
                await self.send(
                    WorkerWelcome(term=self.term, session=SessionId(self._sessions), timing=TIMINGS.to_spec())
                )
            self.said.append(body)
            self.heads.append(frame.head)
        self.ended += 1

    async def send(self, body: AttachDown, term: int | None = None) -> None:
        self._sent += 1
        head = Head(term=Term(self.term if term is None else term), session=SessionId(self._sessions), seq=self._sent)
        await self._call.write(ATTACH_DOWN.encode(body, head))

    def of(self, kind: type[T]) -> list[T]:
        """Everything of one kind that workers said."""
        return [body for body in self.said if isinstance(body, kind)]

    async def told(self, kind: type[T], condition: Callable[[T], bool] = lambda _: True, after: int = 0) -> T:
        """The first frame of the kind, past `after` of them, for which the condition holds; waits for it."""

        def found() -> T | None:
            return next((body for body in self.of(kind)[after:] if condition(body)), None)

        return await eventually(f"a worker says {kind.__name__}", found)

    async def bring_up(
        self,
        devices: dict[str, NodeId],
        replica: ReplicaId = REPLICA,
        spec: ReplicaSpec = SPEC,
        sources: tuple[WeightSource, ...] = (),
    ) -> Epoch:
        """Prepare, form and load a replica over the devices, in the order given; its epoch."""
        for device, node in devices.items():
            await self.idle_rank(node, device)
        self._epochs[replica] += 1
        epoch = Epoch(self._epochs[replica])
        members = tuple(
            Member(rank=index, node=node, device=device, host="127.0.0.1")
            for index, (device, node) in enumerate(devices.items())
        )
        await self.send(
            PrepareGroup(replica=replica, epoch=epoch, members=members, nonce=draw_id(), spec=spec, deadline_ms=20_000)
        )
        prepared = await self.group_state(replica, epoch, GroupPhase.PREPARED)
        await self.send(FormGroup(replica=replica, epoch=epoch, rendezvous=prepared.rendezvous, deadline_ms=20_000))
        await self.group_state(replica, epoch, GroupPhase.FORMED)
        await self.send(LoadReplica(replica=replica, epoch=epoch, deadline_ms=0, sources=sources))
        await self.group_state(replica, epoch, GroupPhase.LOADED)
        return epoch

    async def group_state(self, replica: ReplicaId, epoch: Epoch, phase: GroupPhase, ok: bool = True) -> GroupState:
        state = await self.told(
            GroupState, lambda body: (body.replica, body.epoch, body.phase) == (replica, epoch, phase)
        )
        assert state.ok is ok, state.reason
        return state

    async def idle_rank(self, node: NodeId, device: str, timeout: float = 30.0) -> int:
        """Pid of the device's rank, once it has said Hello."""

        def found() -> int | None:
            pids: int | None = None
            for body in self.said:
                infos = (
                    body.ranks if isinstance(body, WorkerSnapshot) else [body] if isinstance(body, RankState) else []
                )
                for info in infos:
                    pids = _up(info, device, pids)
            return pids

        return await eventually(f"{device} of {node} is up", found, timeout)


def _up(info: RankInfo | RankState, device: str, before: int | None) -> int | None:
    if info.device != device:
        return before
    return info.pid if info.phase.name not in ("STARTING", "EXITED") else None


class _Session(session_pb2_grpc.SessionServicer):
    def __init__(self, leader: PlayedLeader) -> None:
        self._leader = leader

    async def Attach(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        await self._leader.attach(request_iterator, context)


# ---------------------------------------------------------------- the gateway


class PlayedGateway:
    """One Serve stream: opens requests, collects tokens by request as a journal does."""

    def __init__(self, address: str, name: str = "gateway", incarnation: str | None = None) -> None:
        self.address = address
        self.name = GatewayId(name)
        self.incarnation = Incarnation(incarnation or draw_id())
        self.said: list[ServeDown] = []
        self.tokens: dict[Slot, list[int]] = defaultdict(list)
        self.finished: dict[Slot, Finish] = {}
        self.ended: str | None = None
        self._slots = 0
        self._channel: Any = None
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        self._channel = grpc.aio.insecure_channel(self.address, options=channel_options(TIMINGS))
        self._call = serve_pb2_grpc.ServingStub(self._channel).Serve()
        hello = ServeHello(
            cluster=CLUSTER,
            name=self.name,
            incarnation=self.incarnation,
            highest_term_seen=Term(0),
            leader_address="",
            heartbeat_interval_ms=500,
        )
        self.ended = None
        await self._call.write(SERVE_UP.encode(hello))
        self._reader = asyncio.create_task(self._read(self._call))
        await self.told(ServeHello)

    async def disconnect(self) -> None:
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    async def send(self, body: ServeUp) -> None:
        await self._call.write(SERVE_UP.encode(body))

    async def open(
        self,
        prompt: list[int],
        epoch: Epoch,
        *,
        replica: ReplicaId = REPLICA,
        max_tokens: int = 20,
        term: int = 1,
        request: str | None = None,
        sampling: Sampling | None = None,
    ) -> OpenRequest:
        """Open a request with one choice; its slot is the first of its choices."""
        self._slots += 1
        body = OpenRequest(
            permit=Permit(
                request=RequestId(request or draw_id()),
                attempt=Attempt(1),
                replica=replica,
                epoch=epoch,
                term=Term(term),
            ),
            choices=(Choice(index=0, slot=Slot(self._slots), seed=7),),
            prompt=pack_u32(prompt),
            sampling=sampling or Sampling(max_tokens=max_tokens),
        )
        await self.send(body)
        return body

    def of(self, kind: type[T]) -> list[T]:
        return [body for body in self.said if isinstance(body, kind)]

    async def told(self, kind: type[T], condition: Callable[[T], bool] = lambda _: True) -> T:
        def found() -> T | None:
            return next((body for body in self.of(kind) if condition(body)), None)

        return await eventually(f"the worker says {kind.__name__}", found)

    async def finish_of(self, slot: Slot) -> list[int]:
        """All tokens of the slot, once it has its finish."""
        await eventually(f"slot {slot} finishes", lambda: slot in self.finished)
        return self.tokens[slot]

    async def _read(self, call: Any) -> None:
        try:
            async for frame in call:
                body = SERVE_DOWN.decode(frame)
                self.said.append(body)
                if isinstance(body, StepTokens):
                    self._journal(body)
            self.ended = "ended"
        except grpc.aio.AioRpcError as error:
            self.ended = f"{error.code().name}: {error.details()}"

    def _journal(self, step: StepTokens) -> None:
        """Take the tokens as a journal does: each index once, in order."""
        start, tokens = 0, unpack_u32(step.tokens)
        columns = (unpack_u32(column) for column in (step.slots, step.first_index, step.counts))
        for slot, first, count in zip(*columns, strict=True):
            journal = self.tokens[Slot(slot)]
            assert first == len(journal), f"slot {slot}: token {first} came when {len(journal)} was due"
            journal.extend(tokens[start : start + count])
            start += count
        for finish in step.finish:
            assert finish.slot not in self.finished
            self.finished[finish.slot] = finish
