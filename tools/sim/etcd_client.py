"""A process's way to the modelled etcd: calls with deadlines, and the watch of a prefix.

`SimEtcdClient` stands where EtcdClient does: the real Registration, Store, LeaseKeeper and Election call it. A call
that is not answered may have been carried out, or be carried out later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from controlplane.runtime.errors import PerdureError
from controlplane.runtime.etcd_types import EtcdDenied, EtcdUnavailable, Get, KeyValue, Lease, Snapshot, Txn, TxnResult
from controlplane.runtime.etcd_watch import PrefixWatch, WatchBatch
from controlplane.runtime.timing import Timings
from tools.sim.etcd import HOST, RETRY_MS, Change, Etcd
from tools.sim.network import Network
from tools.sim.process import Future, Process

T = TypeVar("T")

LATE_ONES_DROPPED = 0.5
"""Share of the calls, caught by a partition or an election, that never arrive; the others do when it ends."""

FAILED_ARE_DONE = 0.5
"""Share of the calls answered with a failure that were carried out all the same."""

RETRANSMIT_S = 0.2
AWAY = (EtcdUnavailable, EtcdDenied)


class SimEtcdClient:
    """Calls of one process. Each raises EtcdUnavailable without an answer in time."""

    def __init__(self, process: Process, etcd: Etcd, network: Network, timings: Timings) -> None:
        self.process = process
        self.etcd = etcd
        self.network = network
        self.timings = timings

    async def txn(self, txn: Txn, *, timeout: float) -> TxnResult:
        return await self.call(lambda: self.etcd.txn(txn), timeout)

    async def get(self, key: str, *, timeout: float) -> KeyValue | None:
        result = await self.txn(Txn(when=(), success=(Get(key),)), timeout=timeout)
        return result.reads[0]

    async def get_prefix(self, prefix: str, *, timeout: float) -> Snapshot:
        return await self.call(lambda: self.etcd.get_prefix(prefix), timeout)

    async def lease_grant(self, ttl: int, *, timeout: float) -> Lease:
        return Lease(*await self.call(lambda: self.etcd.grant(ttl), timeout))

    async def lease_revoke(self, lease: int, *, timeout: float) -> None:
        await self.call(lambda: self.etcd.revoke(lease), timeout)

    async def lease_remaining(self, lease: int, *, timeout: float) -> int:
        return await self.call(lambda: self.etcd.remaining(lease), timeout)

    async def keepalive_once(self, lease: int, *, timeout: float) -> int:
        return await self.call(lambda: self.etcd.keepalive(lease), timeout)

    async def call(self, operation: Callable[[], T], timeout: float) -> T:
        answer = Future()
        self.network.kernel.after(self.delay(), self._arrive, operation, answer)
        if await self.process.first(answer, timeout=timeout) < 0:
            raise EtcdUnavailable("no answer in time", RETRY_MS)
        return await answer

    def delay(self) -> float:
        return self.network.delay(self.process.host, HOST) + self.etcd.delay_s * self.network.kernel.random.random()

    def _arrive(self, operation: Callable[[], Any], answer: Future) -> None:
        kernel, etcd = self.network.kernel, self.etcd
        if self.network.is_cut(self.process.host, HOST) or etcd.electing:
            if kernel.random.random() >= LATE_ONES_DROPPED:
                kernel.after(kernel.random.uniform(0.2, 1.0), self._arrive, operation, answer)
            return
        if not etcd.up:
            kernel.after(self.delay(), self._answer, answer, None, EtcdUnavailable("etcd is away", RETRY_MS))
            return
        value, error = None, None
        fails = kernel.random.random() < etcd.failing
        try:
            if not fails or kernel.random.random() < FAILED_ARE_DONE:
                value = operation()
        except PerdureError as refusal:
            error = refusal
        if fails:
            error = EtcdUnavailable("the call failed", RETRY_MS)
        kernel.after(self.delay(), self._answer, answer, value, error)

    def _answer(self, answer: Future, value: Any, error: Exception | None) -> None:
        if not self.network.is_cut(HOST, self.process.host):
            if error is not None:
                self.process.run(answer.fail, error)
            else:
                self.process.run(answer.set, value)


class SimPrefixWatch(PrefixWatch):
    """The real watch's reads and differences over the modelled stream."""

    def __init__(self, client: SimEtcdClient, prefix: str, timings: Timings, random: Random) -> None:
        super().__init__(client, prefix, timings, client.process, random)  # pyright: ignore[reportArgumentType]
        self._sim = client

    async def follow(self, take: Callable[[WatchBatch], None]) -> None:
        """Eternal: `take` gets every batch."""
        while True:
            try:
                take(await self._read())
                await self._attend(take)
            except AWAY:
                self._connected = False
            await self._sim.process.sleep(self._backoff.next())

    async def _attend(self, take: Callable[[WatchBatch], None]) -> None:
        stream = _Stream(self._sim, self._prefix)
        try:
            await stream.open(self._revision)
            self._connected = True
            self._backoff.reset()
            while True:
                for revision, changes in await stream.take():
                    take(self._apply(revision, changes))
        finally:
            stream.close()


class _Stream:
    """One watch stream: silent while etcd cannot be reached, and given up when it stays so."""

    def __init__(self, client: SimEtcdClient, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._number = 0
        self._news: list[tuple[int, tuple[Change, ...]]] = []
        self._woken = Future()
        self._over = False
        # Sent by etcd and not here yet; a partition holds it up.
        self._wire: deque[tuple[int, tuple[Change, ...]]] = deque()

    async def open(self, revision: int) -> None:
        def create() -> int:
            if self._client.etcd.content.revision < revision:
                raise EtcdUnavailable("was restored between a read and its watch", RETRY_MS)
            self._number = self._client.etcd.watch(self._prefix, revision, self._pushed, self._ended)
            return self._number

        await self._client.call(create, self._client.timings.session_silence)

    def close(self) -> None:
        self._client.etcd.unwatch(self._number)

    async def take(self) -> list[tuple[int, tuple[Change, ...]]]:
        """What came; an etcd that is silent is asked for a sign of life."""
        timings = self._client.timings
        while not self._news:
            if self._over:
                raise EtcdUnavailable("the watch ended", RETRY_MS)
            self._woken = Future()
            if await self._client.process.first(self._woken, timeout=timings.heartbeat_interval) < 0:
                await self._client.call(lambda: None, timings.session_silence - timings.heartbeat_interval)
        news, self._news = self._news, []
        return news

    def _pushed(self, revision: int, changes: tuple[Change, ...]) -> None:
        self._wire.append((revision, changes))
        self._client.network.kernel.after(self._client.delay(), self._arrive)

    def _arrive(self) -> None:
        if self._over:
            return
        if self._client.network.is_cut(HOST, self._client.process.host):
            self._client.network.kernel.after(RETRANSMIT_S, self._arrive)
            return
        while self._wire:
            self._client.process.run(self._heard, *self._wire.popleft())

    def _heard(self, revision: int, changes: tuple[Change, ...]) -> None:
        self._news.append((revision, changes))
        self._woken.set()

    def _ended(self) -> None:
        self._over = True
        self._client.etcd.unwatch(self._number)
        self._client.process.run(self._woken.set)
