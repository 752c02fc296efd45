"""The leader's end of a session stream, the same for worker daemons (Attach) and gateways (Route)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import structlog

from controlplane.connection import Connection, decode_head, first_hello, refusal
from controlplane.coordinator import Coordinator
from controlplane.core.messages import Event, GatewaySaid, WorkerSaid
from controlplane.runtime.codec import Envelope, UnknownBody, WireError
from controlplane.runtime.ids import Term
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.messages.common import ReasonKind
from controlplane.runtime.messages.route import GatewayHello
from controlplane.runtime.messages.session import WorkerHello
from controlplane.runtime.timing import Timings

log = structlog.get_logger()

Said = Callable[..., WorkerSaid | GatewaySaid]


class SessionStreams:
    """Takes sessions for the coordinator, or refuses them with the leader's address."""

    def __init__(self, coordinator: Coordinator, leader: LeaderWatch, timings: Timings) -> None:
        self._coordinator = coordinator
        self._leader = leader
        self._timings = timings

    async def serve(
        self,
        requests: AsyncIterator[Any],
        context: grpc.aio.ServicerContext[Any, Any],
        *,
        up: Envelope,
        down: Envelope,
        hello_type: type[WorkerHello] | type[GatewayHello],
        said: Said,
    ) -> AsyncIterator[Any]:
        """One call: hello, then frames both ways until either side ends it."""
        hello = await first_hello(requests, up, context, self._timings.stage)
        if not isinstance(hello, hello_type):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a session begins with {hello_type.__name__}")
        if (refused := self._refusal(hello)) is not None:
            yield down.encode(refused)
            return
        connection = self._coordinator.connect(hello, down, context.peer())
        term = self._coordinator.term
        assert connection is not None
        assert term is not None
        reader = asyncio.create_task(self._read(requests, connection, term, up, said))
        try:
            async for frame in connection.frames():
                yield frame
        finally:
            reader.cancel()
            await self._coordinator.disconnect(connection, term, worker=hello_type is WorkerHello)

    def _refusal(self, hello: WorkerHello | GatewayHello) -> Any:
        leader = self._leader.current
        address = leader.address if leader is not None else ""
        term = self._coordinator.term
        highest = max(self._leader.highest_term, term or Term(0))
        if term is None:
            return refusal(ReasonKind.NOT_LEADER, "this control plane does not lead", highest, address)
        if hello.cluster != self._coordinator.identity.cluster:
            text = f"cluster {hello.cluster} asked for, this is {self._coordinator.identity.cluster}"
            return refusal(ReasonKind.INVALID, text, highest, "")
        return None

    async def _read(
        self, requests: AsyncIterator[Any], connection: Connection, term: Term, up: Envelope, said: Said
    ) -> None:
        try:
            async for frame in requests:
                head = decode_head(frame)
                connection.note_received(head)
                try:
                    event: Event = said(connection.id, head, up.decode(frame))
                except UnknownBody:
                    log.warning("frame_skipped", peer=connection.peer, seq=head.seq)
                    continue
                await self._coordinator.hand_in(term, event)
        except WireError as error:
            log.warning("frame_refused", peer=connection.peer, error=str(error))
        finally:
            connection.close()
