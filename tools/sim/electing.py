"""A process's lease, its view of who leads, and its candidacy: the real classes with their waits made virtual."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from controlplane.election import Election, ElectionEvent
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.errors import Rejected
from controlplane.runtime.etcd_types import EtcdLeaseGone, EtcdUnavailable
from controlplane.runtime.etcd_watch import WatchBatch
from controlplane.runtime.keys import Keys
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.lease import LeaseEvent, LeaseKeeper
from controlplane.runtime.records import LeaderRecord, NodeRecord, PeerRecord
from controlplane.runtime.registration import Registration
from controlplane.runtime.timing import Timings
from tools.sim.etcd_client import AWAY, SimEtcdClient, SimPrefixWatch
from tools.sim.network import Refused, Side
from tools.sim.probing import refused_twice
from tools.sim.process import Future, Signal


class SimLeaderWatch(LeaderWatch):
    """The real one; `changed` wakes tasks of the simulated process."""

    def __init__(self, client: SimEtcdClient, keys: Keys, timings: Timings, random: Random) -> None:
        super().__init__(client, keys, timings, client.process, random)  # pyright: ignore[reportArgumentType]
        self._followed = SimPrefixWatch(client, keys.leader, timings, random)
        self._signal = Signal()

    async def run(self) -> None:
        await self._followed.follow(self._take)

    def _take(self, batch: WatchBatch) -> None:
        for key, item in batch.changes:
            if key == self._key_name:
                self._see(item)

    async def changed(self) -> None:
        await self._signal.wait()

    def next_change(self) -> Future:
        return self._signal.wait()

    def _notify(self) -> None:
        self._signal.set()


class SimLeaseKeeper(LeaseKeeper):
    """The real one's turns, in a loop of the simulated process."""

    def __init__(
        self,
        client: SimEtcdClient,
        key: str,
        record_under: Callable[[int], NodeRecord | PeerRecord],
        timings: Timings,
        random: Random,
        on_event: Callable[[LeaseEvent], None],
    ) -> None:
        registration = Registration(client, key, record_under, timings)  # pyright: ignore[reportArgumentType]
        super().__init__(client, registration, timings, client.process, random, on_event)  # pyright: ignore[reportArgumentType]
        self._process = client.process
        self._hurried = Signal()

    def relet(self) -> None:
        self._doubted = True
        self._hurried.set()

    async def run(self) -> None:
        wait = self._timings.keepalive_period
        while True:
            await self._process.first(self._hurried.wait(), timeout=min(wait, self._trust_left()))
            wait = await self._turn()


class SimElection(Election):
    """The real one's turns, in a loop of the simulated process; its events go to `on_event` at once."""

    def __init__(
        self,
        client: SimEtcdClient,
        keys: Keys,
        candidate: PeerRecord,
        leader: SimLeaderWatch,
        timings: Timings,
        random: Random,
        on_event: Callable[[ElectionEvent], None],
    ) -> None:
        super().__init__(client, keys, candidate, leader, timings, client.process, random)  # pyright: ignore[reportArgumentType]
        self._process = client.process
        self._sim_leader = leader
        self._on_event = on_event
        self._signal = Signal()
        self._wake = self._signal  # pyright: ignore[reportAttributeAccessIssue]
        self._keeper = SimLeaseKeeper(
            client, keys.peer(candidate.name), lambda _: candidate, timings, random, self._on_lease
        )
        self._proven: set[str] = set()
        self._network = client.network

    async def begin(self) -> None:
        """Eternal: register, then stand."""
        backoff = Backoff(self._timings, self._process.kernel.random)
        while True:
            try:
                await self._keeper.start()
                break
            except (EtcdUnavailable, EtcdLeaseGone):
                await self._process.sleep(backoff.next())
            except Rejected as refusal:
                # The name is another's: the real process exits, and whoever started it starts it again.
                self._process.kernel.tell(self._process.name, "registration_refused", reason=refusal.reason.text)
                await self._process.sleep(self._timings.lease_ttl)
        self._process.spawn(self._keeper.run())
        self._process.spawn(self._follow_key())
        self._process.spawn(self._guard_leader())
        await self._stand()

    async def _stand(self) -> None:
        while True:
            woken = self._signal.wait()
            try:
                wait = await self._turn()
                self._backoff.reset()
            except (*AWAY, EtcdLeaseGone):
                wait = self._backoff.next()
            await self._process.first(woken, timeout=wait)

    def _emit(self, event: ElectionEvent) -> None:
        self._on_event(event)

    # ------------------------------------------------------------ the leader's guard

    async def _guard_leader(self) -> None:
        while True:
            record, key = self._leader.current, self._leader.key
            changed = self._sim_leader.next_change()
            if (
                record is not None
                and key is not None
                and record.incarnation not in self._proven
                and (record.incarnation != self._candidate.incarnation)
            ):
                guard = self._process.spawn(self._guard_one(record, key.lease))
                await self._process.first(changed, guard)
                guard.cancel()
                if guard.done:
                    continue
            await changed

    async def _guard_one(self, record: LeaderRecord, lease: int) -> None:
        """Done when the leader is proven dead and its lease revoked."""
        backoff = Backoff(self._timings, self._process.kernel.random)
        worked = False
        while True:
            side = await self._keep_connected(record.address)
            worked = worked or side
            if worked and await refused_twice(self._process, self._network, record.address, self._timings):
                try:
                    await self._revoke(lease)
                except AWAY:
                    pass
                else:
                    self._process.kernel.tell(self._process.name, "leader_proven_dead", leader=record.name)
                    self._proven.add(record.incarnation)
                    return
            await self._process.sleep(backoff.next())

    async def _keep_connected(self, address: str) -> bool:
        """True once a connection that worked broke; False if none could be made."""
        dialled = self._network.dial(self._process, address, "none")
        try:
            if await self._process.first(dialled, timeout=self._timings.stage) < 0:
                return False
            side: Side = await dialled
        except Refused:
            return False
        broken = Future()
        side.on_closed = broken.set
        if side.closed:
            return True
        await broken
        return True
