"""The worker's end of its session with the leading coordinator: client of Session.Attach.

A link is one attempt: a channel, a stream, a Hello. Heads (term, session, seq, ack) are put on here; whether a frame
counts is the core's matter. A link that breaks is followed by the next after a backoff, to wherever the leader key or
the last hint points.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import grpc.aio
import structlog

from controlplane.runtime.actor import Mailbox, MailboxFull
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.calls import StreamEnded, write_frame
from controlplane.runtime.clock import Clock
from controlplane.runtime.codec import UnknownBody, WireError, codec_of
from controlplane.runtime.ids import SessionId, Term
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.messages.common import Head
from controlplane.runtime.messages.session import AttachUp, WorkerWelcome
from controlplane.runtime.race import race
from controlplane.runtime.timing import Timings, channel_options
from controlplane.runtime.wire import ATTACH_DOWN, ATTACH_UP
from dataplane.core.messages import Event, LeaderClosed, LeaderOpened, LeaderSaid, LinkId, TermSeen
from protos.perdure.v1 import common_pb2, session_pb2_grpc

log = structlog.get_logger()

OUTBOX_FRAMES_MAX = 4096
"""A leader that is this many frames behind is too slow to be followed; its link is closed."""

_HEAD = codec_of(Head, common_pb2.Head.DESCRIPTOR)


class LinkEnded(Exception):
    """The link is over; the text says why."""


class _Link:
    """One attempt."""

    def __init__(self, link: LinkId, address: str, term: Term) -> None:
        self.link = link
        self.address = address
        self.welcomed = asyncio.Event()
        self.left = False
        self._outbox: Mailbox[AttachUp | None] = Mailbox(f"leader {address}", OUTBOX_FRAMES_MAX)
        self._term = term
        self._session = SessionId(0)
        self._sent = 0
        self._received = 0

    def send(self, body: AttachUp) -> None:
        if self.left:
            return
        try:
            self._outbox.offer(body)
        except MailboxFull:
            log.warning("leader_too_slow", address=self.address, frames=OUTBOX_FRAMES_MAX)
            self._outbox.drain(OUTBOX_FRAMES_MAX)
            self.leave()

    def leave(self) -> None:
        """End the link after what was sent before."""
        if not self.left:
            self.left = True
            self._outbox.put_latest("leave", None)

    def note_received(self, head: Head, body: object) -> None:
        self._received = max(self._received, head.seq)
        if isinstance(body, WorkerWelcome):
            self._term, self._session = body.term, body.session
            self.welcomed.set()

    async def write(self, call: Any) -> None:
        """Write until the link is left."""
        while (body := await self._outbox.get()) is not None:
            self._sent += 1
            head = Head(term=self._term, session=self._session, seq=self._sent, ack=self._received)
            await write_frame(call, ATTACH_UP.encode(body, head))
        raise LinkEnded("left")


class CoordinatorLink:
    """Keeps one link to the leader alive, for ever."""

    def __init__(
        self, leader: LeaderWatch, timings: Timings, clock: Clock, random: Random, post: Callable[[Event], None]
    ) -> None:
        self._leader = leader
        self._timings = timings
        self._clock = clock
        self._backoff = Backoff(timings, random)
        self._post = post
        self._current: _Link | None = None
        self._links = 0
        # An address that a refusal named, to be tried before all others, once.
        self._said = ""
        self._ending = False
        self._ended = asyncio.Event()

    def send(self, link: LinkId, body: AttachUp) -> None:
        """Queue a frame on the link; one that is over takes none."""
        if self._current is not None and self._current.link == link:
            self._current.send(body)

    def leave(self, link: LinkId, highest_term: Term, address: str) -> None:
        """End the link after what was sent before, and look for a higher term."""
        self._leader.hint(address, highest_term)
        if self._current is not None and self._current.link == link:
            self._said = address if address != self._current.address else ""
            self._current.leave()

    async def run(self) -> None:
        """Eternal: one link after the other."""
        await race(self._follow(), self._keep_terms())

    async def end(self) -> None:
        """Leave for good, once what was sent has left, within a session's silence."""
        self._ending = True
        if self._current is None:
            return
        self._current.leave()
        try:
            async with asyncio.timeout(self._timings.session_silence):
                await self._ended.wait()
        except TimeoutError:
            log.warning("leader_link_abandoned", address=self._current.address)

    async def _keep_terms(self) -> None:
        """Pass on what the leader key says."""
        while True:
            current, highest = self._leader.current, self._leader.highest_term
            address = current.address if current is not None and current.term == highest else ""
            self._post(TermSeen(highest, address))
            await self._leader.changed()

    async def _follow(self) -> None:
        logged = ("", "")
        while not self._ending:
            address = await self._address()
            ended = (address, await self._attempt(address))
            if ended != logged:
                logged = ended
                log.info("leader_link_ended", address=address, reason=ended[1])
            if not self._ending and not self._knows_better_than(address):
                await race(self._clock.sleep(self._backoff.next()), self._leader.changed())
        self._ended.set()
        await asyncio.Event().wait()

    def _knows_better_than(self, address: str) -> bool:
        return bool(self._said) or self._leader.addresses[:1] not in ((), (address,))

    async def _address(self) -> str:
        """Where to look; waits until someone has said where."""
        if self._said:
            said, self._said = self._said, ""
            return said
        while not self._leader.addresses:
            log.info("leader_awaited")
            await self._leader.changed()
        return self._leader.addresses[0]

    async def _attempt(self, address: str) -> str:
        """One link from dial to end. Why it ended."""
        self._links += 1
        link = self._current = _Link(LinkId(self._links), address, self._leader.highest_term)
        opened = False
        try:
            # A channel of its own each time: an old one would sit out its backoff.
            async with grpc.aio.insecure_channel(address, options=channel_options(self._timings)) as channel:
                call = session_pb2_grpc.SessionStub(channel).Attach()
                try:
                    async with asyncio.timeout(self._timings.stage):
                        await race(call.wait_for_connection(), self._moved(address))
                    opened = True
                    self._post(LeaderOpened(link.link, address))
                    await race(link.write(call), self._read(call, link), self._greet(link), self._moved(address))
                finally:
                    call.cancel()
        except TimeoutError:
            return "no answer in time"
        except (LinkEnded, StreamEnded, WireError) as error:
            return str(error)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        finally:
            self._current = None
            if opened:
                self._post(LeaderClosed(link.link))
        return "ended"

    async def _moved(self, address: str) -> None:
        """Raises LinkEnded once somewhere else has become the best place to look."""
        before = self._leader.addresses[:1]
        while self._leader.addresses[:1] in ((), before, (address,)):
            await self._leader.changed()
        raise LinkEnded("the leader is elsewhere")

    async def _greet(self, link: _Link) -> None:
        """A Welcome answers the Hello in time, or the link is dropped."""
        async with asyncio.timeout(self._timings.stage):
            await link.welcomed.wait()
        self._backoff.reset()
        await asyncio.Event().wait()

    async def _read(self, call: Any, link: _Link) -> None:
        async for frame in call:
            head = _HEAD.from_proto(frame.head)
            try:
                body = ATTACH_DOWN.decode(frame)
            except UnknownBody:
                log.warning("frame_skipped", address=link.address, seq=head.seq)
                continue
            link.note_received(head, body)
            self._post(LeaderSaid(link.link, head, body))
        raise LinkEnded("the leader ended it")
