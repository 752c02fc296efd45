"""A worker daemon that answers a gateway from a deterministic source of tokens.

It speaks the whole of Serve over real sockets and computes nothing: token i = f(prompt, seed, i). So a test knows what
every client must have received, whatever broke on the way.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc.aio

from controlplane.runtime.ids import (
    ClusterId,
    DeploymentId,
    Epoch,
    Incarnation,
    NodeId,
    ReplicaId,
    Slot,
    Term,
    draw_id,
)
from controlplane.runtime.messages.common import Capacity, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import (
    ReplicaRow,
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
from controlplane.runtime.wire import SERVE_DOWN, SERVE_UP
from protos.perdure.v1 import serve_pb2_grpc

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
