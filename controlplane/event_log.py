"""What happened, when and why: kept in memory for `perdure ctl events`, and as JSON lines in the state folder.

A full disk costs events, counted in `dropped`, never the coordinator.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import structlog

from controlplane.core.messages import Recorded
from controlplane.runtime.clock import Clock
from controlplane.runtime.ids import Epoch, NodeId, ReplicaId, RequestId, Term
from controlplane.runtime.messages.common import Reason

EVENTS_KEPT = 10_000
TAIL_BYTES = 4 * 1024 * 1024

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """One event. `seq` counts within the process that answers; `wall_ms` is for people."""

    seq: int
    wall_ms: int
    name: str
    term: Term
    node: NodeId = NodeId("")
    replica: ReplicaId = ReplicaId("")
    epoch: Epoch = Epoch(0)
    request: RequestId = RequestId("")
    reason: Reason | None = None
    details: Mapping[str, str] = field(default_factory=dict)


class EventLog:
    """A ring of events with followers, and a file behind it (None: memory only)."""

    def __init__(self, clock: Clock, path: Path | None) -> None:
        self._clock = clock
        self._path = path
        self._seq = 0
        self._ring: deque[EventRecord] = deque(maxlen=EVENTS_KEPT)
        self._followers: set[asyncio.Event] = set()
        self.dropped = 0

    def load(self) -> None:
        """Take over what earlier processes wrote to the same file, so that a new leader can tell the story so far."""
        if self._path is None or not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(max(0, self._path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
        known = {(event.wall_ms, event.name, event.term, event.node, event.replica) for event in self._ring}
        for line in lines:
            try:
                event = msgspec.json.decode(line, type=EventRecord)
            except msgspec.DecodeError:
                continue  # the first line may be cut, the last one half written by a process that died
            if (event.wall_ms, event.name, event.term, event.node, event.replica) not in known:
                self._append(event)

    def record(self, recorded: Recorded, term: Term) -> None:
        """Append what the core reported, tell followers, write it down."""
        event = EventRecord(
            seq=0,
            wall_ms=self._clock.wall_ms(),
            name=recorded.name,
            term=term,
            node=recorded.node,
            replica=recorded.replica,
            epoch=recorded.epoch,
            request=recorded.request,
            reason=recorded.reason,
            details=recorded.details,
        )
        self._append(event)
        self._write(event)
        shown = {
            key: value for key, value in msgspec.to_builtins(event).items() if value and key not in ("name", "seq")
        }
        shown.pop("wall_ms")
        log.info(event.name, **shown)

    async def follow(self, last: int, follow: bool) -> AsyncIterator[EventRecord]:
        """The newest `last` events (0: all kept), then, if asked, every further one as it happens."""
        past = list(self._ring)[-last:] if last else list(self._ring)
        for event in past:
            yield event
        seen = self._seq
        if not follow:
            return
        news = asyncio.Event()
        self._followers.add(news)
        try:
            while True:
                fresh = [event for event in self._ring if event.seq > seen]
                seen = self._seq
                for event in fresh:
                    yield event
                if self._seq == seen:
                    news.clear()
                    await news.wait()
        finally:
            self._followers.discard(news)

    def _append(self, event: EventRecord) -> None:
        self._seq += 1
        self._ring.append(replace(event, seq=self._seq))
        for follower in self._followers:
            follower.set()

    def _write(self, event: EventRecord) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(msgspec.json.encode(event) + b"\n")
        except OSError as error:
            self.dropped += 1
            log.warning("event_log_write_failed", path=str(self._path), error=str(error), dropped=self.dropped)
