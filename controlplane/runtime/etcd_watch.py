"""Following a prefix through everything that etcd does: restarts, silence, compaction, restore from a snapshot.

A watch alone is not enough (measured): after a restore the revision is lower and a watch resumed at the old one sleeps;
after a compaction deletions are skipped. So every (re)connect reads the whole prefix and reports the difference. And a
watch that begins at the very revision of a compaction may miss that revision's deletions (measured with 3.5.1;
etcd-io/etcd#18089): ours begins at the revision that was read, so that any later compaction ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import grpc.aio
import structlog

from controlplane.runtime.backoff import Backoff
from controlplane.runtime.clock import Clock
from controlplane.runtime.errors import PerdureError
from controlplane.runtime.etcd import ETCD_ERRORS, EtcdClient
from controlplane.runtime.etcd_rpc import EtcdRpc, WatchMessage, WatchStream
from controlplane.runtime.etcd_types import KeyValue, prefix_end
from controlplane.runtime.race import within
from controlplane.runtime.timing import Timings

T = TypeVar("T")

log = structlog.get_logger()

Change = tuple[str, KeyValue | None]
"""A key and its new state; None: it is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchBatch:
    """What changed, oldest first: at first every key, after a lost connection whatever differs from before."""

    revision: int
    changes: tuple[Change, ...]
    # Set when the prefix was read, not watched: all its keys at `revision`.
    content: Mapping[str, KeyValue] | None = None
    # The store's revision went back: etcd was restored from a snapshot, and what is gone may only be forgotten.
    restored: bool = False


class PrefixWatch:
    """One prefix, followed for ever. One reader."""

    def __init__(self, client: EtcdClient, prefix: str, timings: Timings, clock: Clock, random: Random) -> None:
        self._client = client
        self._prefix = prefix
        self._timings = timings
        self._clock = clock
        self._backoff = Backoff(timings, random)
        self._revision = 0
        self._content: dict[str, KeyValue] = {}
        self._connected = False

    @property
    def connected(self) -> bool:
        """False while etcd is away: what was seen last may be out of date."""
        return self._connected

    async def batches(self) -> AsyncGenerator[WatchBatch]:
        """Never ends and raises nothing that etcd causes. To be closed (`aclosing`)."""
        while True:
            try:
                yield await self._read()
                async with aclosing(self._follow()) as followed:
                    async for batch in followed:
                        yield batch
            except ETCD_ERRORS as error:
                self._interrupted(error)
            await self._clock.sleep(self._backoff.next())

    async def _read(self) -> WatchBatch:
        snapshot = await self._client.get_prefix(self._prefix, timeout=self._timings.session_silence)
        content = {item.key: item for item in snapshot.items}
        gone: list[Change] = [(key, None) for key in self._content if key not in content]
        put: list[Change] = [(key, item) for key, item in content.items() if self._content.get(key) != item]
        restored = snapshot.revision < self._revision
        if self._revision:
            log.info("watch_resynced", prefix=self._prefix, changes=len(gone) + len(put), restored=restored)
        self._content = content
        self._revision = snapshot.revision
        return WatchBatch(revision=snapshot.revision, changes=(*gone, *put), content=dict(content), restored=restored)

    async def _follow(self) -> AsyncGenerator[WatchBatch]:
        """Changes after the last read. Raises one of ETCD_ERRORS when the watch is of no more use."""
        rpc, call = self._client.stream_target()
        stream = rpc.watch(call)
        known = self._revision
        try:
            await self._begin(stream, rpc)
            self._connected = True
            self._backoff.reset()
            while True:
                message = await self._message(stream, rpc)
                changes = tuple((key, item) for revision, key, item in message.changes if revision > known)
                if changes:
                    yield self._apply(message.revision, changes)
        except grpc.aio.AioRpcError as error:
            raise self._client.stream_failed(rpc, error) from error
        finally:
            stream.cancel()

    async def _begin(self, stream: WatchStream, rpc: EtcdRpc) -> None:
        create = stream.create(self._prefix.encode(), prefix_end(self._prefix), self._revision)
        await self._answered(create, self._timings.session_silence, rpc)
        message = await self._message(stream, rpc)
        if not message.created:
            raise self._client.stream_failed(rpc, "answered a new watch with something else")
        if message.revision < self._revision:
            raise self._client.stream_failed(rpc, "was restored between a read and its watch")

    async def _message(self, stream: WatchStream, rpc: EtcdRpc) -> WatchMessage:
        """The next message; after a heartbeat interval without one etcd is asked for a sign of life."""
        reading = asyncio.ensure_future(stream.read())
        try:
            await asyncio.wait({reading}, timeout=self._timings.heartbeat_interval)
            if not reading.done():
                patience = self._timings.session_silence - self._timings.heartbeat_interval
                await self._answered(stream.ask_progress(), patience, rpc)
                await self._answered(asyncio.wait({reading}), patience, rpc)
            message = reading.result()
        finally:
            if not reading.cancel() and not reading.cancelled():
                # Looked at even if a write failed first.
                reading.exception()
        if message.cancelled is not None:
            raise self._client.stream_failed(rpc, f"watch ended ({message.cancelled})")
        return message

    async def _answered(self, wait: Awaitable[T], patience: float, rpc: EtcdRpc) -> T:
        try:
            return await within(patience, wait)
        except TimeoutError as error:
            raise self._client.stream_failed(rpc, "silent") from error

    def _apply(self, revision: int, changes: tuple[Change, ...]) -> WatchBatch:
        for key, item in changes:
            if item is None:
                self._content.pop(key, None)
            else:
                self._content[key] = item
        self._revision = max(self._revision, revision)
        return WatchBatch(revision=revision, changes=changes)

    def _interrupted(self, error: PerdureError) -> None:
        if self._connected:
            log.warning("watch_interrupted", prefix=self._prefix, reason=error.reason.text)
        self._connected = False
