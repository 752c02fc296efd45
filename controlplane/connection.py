"""The leader's end of one session stream, worker's or gateway's: heads, an outbox, and nothing decided.

A session is one bidirectional gRPC stream. The reader hands every frame to the coordinator and waits while its
mailbox is full, so that a fast peer is slowed on its own stream; the writer sends what the coordinator put into the
outbox. A peer that lets its outbox fill up is too slow to be led and its stream is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import structlog

from controlplane.core.messages import ConnectionId
from controlplane.runtime.actor import Mailbox, MailboxFull
from controlplane.runtime.codec import Envelope, WireError
from controlplane.runtime.ids import SessionId, Term
from controlplane.runtime.messages.common import Head, Reason, ReasonKind
from controlplane.runtime.messages.route import GatewayWelcome, RouteDown
from controlplane.runtime.messages.session import AttachDown, SessionRefused, WorkerWelcome

OUTBOX_FRAMES_MAX = 4096

log = structlog.get_logger()


class _Close:
    """Marks the end of the outbox."""


Outgoing = AttachDown | RouteDown | _Close


class Connection:
    """One stream as the coordinator sees it: an id to name it by, an outbox to send through."""

    def __init__(self, connection: ConnectionId, term: Term, down: Envelope, peer: str) -> None:
        self.id = connection
        self.peer = peer
        self._term = term
        self._down = down
        self._session = SessionId(0)
        self._sent = 0
        self._received = 0
        self._outbox: Mailbox[Outgoing] = Mailbox(f"outbox {peer}", OUTBOX_FRAMES_MAX)
        self._closing = False

    def send(self, body: AttachDown | RouteDown) -> None:
        """Queue `body`. A full outbox closes the connection: its peer has not read for thousands of frames."""
        if self._closing:
            return
        if isinstance(body, WorkerWelcome | GatewayWelcome):
            self._session = body.session
        try:
            self._outbox.offer(body)
        except MailboxFull:
            log.warning("session_overflowed", peer=self.peer, frames=OUTBOX_FRAMES_MAX)
            self._outbox.drain(OUTBOX_FRAMES_MAX)
            self.close()

    def close(self) -> None:
        """End the stream after what is queued."""
        if not self._closing:
            self._closing = True
            self._outbox.put_latest("close", _Close())

    def note_received(self, head: Head) -> None:
        """Remember what the next frames down acknowledge."""
        self._received = max(self._received, head.seq)

    async def frames(self) -> AsyncIterator[Any]:
        """Encoded frames to write, until the connection is closed."""
        while True:
            body = await self._outbox.get()
            if isinstance(body, _Close):
                return
            self._sent += 1
            head = Head(term=self._term, session=self._session, seq=self._sent, ack=self._received)
            yield self._down.encode(body, head)


async def first_hello(
    request_iterator: AsyncIterator[Any], up: Envelope, context: grpc.aio.ServicerContext[Any, Any], timeout: float
) -> Any:
    """The first frame's body. Ends the call if none comes in time or it breaks the protocol."""
    try:
        async with asyncio.timeout(timeout):
            frame = await anext(request_iterator)
        return up.decode(frame)
    except (TimeoutError, StopAsyncIteration):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {timeout:g} s")
    except WireError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def refusal(kind: ReasonKind, text: str, highest_term: Term, leader_address: str) -> SessionRefused:
    """What a process that cannot take a session answers."""
    return SessionRefused(reason=Reason(kind=kind, text=text), highest_term=highest_term, leader_address=leader_address)


def decode_head(frame: Any) -> Head:
    """The head of a received frame."""
    head = frame.head
    return Head(term=Term(head.term), session=SessionId(head.session), seq=head.seq, ack=head.ack)
