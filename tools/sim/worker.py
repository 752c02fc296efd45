"""The worker daemon's shell as a model: WorkerShell, CoordinatorLink, ServingServicer and the pool of its ranks."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

from controlplane.runtime.backoff import Backoff
from controlplane.runtime.errors import Rejected
from controlplane.runtime.etcd_types import EtcdLeaseGone, EtcdUnavailable
from controlplane.runtime.ids import SessionId, Term
from controlplane.runtime.keys import Keys
from controlplane.runtime.lease import LeaseEvent, LeaseEventKind
from controlplane.runtime.messages.common import Head, Reason, ReasonKind
from controlplane.runtime.messages.serve import ServeHello
from controlplane.runtime.messages.session import AttachUp, WorkerWelcome
from controlplane.runtime.records import NodeRecord
from controlplane.runtime.timing import Timings
from dataplane import frames
from dataplane.core import messages as core
from dataplane.core.state import Identity, WorkerState
from dataplane.core.step import begin, step
from tools.sim.electing import SimLeaderWatch, SimLeaseKeeper
from tools.sim.etcd_client import SimEtcdClient
from tools.sim.network import Network, Side
from tools.sim.process import Process, Task
from tools.sim.ranks import RankHouse, SimRank
from tools.sim.streams import Reader, StreamEnded, dial
from tools.sim.watching import Watcher

TICKS_PER_HEARTBEAT = 5
"""Half as many as the real daemon's: "several times a heartbeat interval" is what its core asks for."""

FORK_S = (0.005, 0.05)


class SimWorker:
    """One daemon, from start to end."""

    def __init__(
        self,
        process: Process,
        client: SimEtcdClient,
        network: Network,
        keys: Keys,
        identity: Identity,
        timings: Timings,
        watcher: Watcher,
        ranks: RankHouse,
    ) -> None:
        self.process = process
        self.network = network
        self.timings = timings
        self.identity = identity
        self.ranks = ranks
        self.watcher = watcher
        random = Random(process.kernel.random.getrandbits(32))
        self.leader = SimLeaderWatch(client, keys, timings, random)
        self.state: WorkerState = begin(identity, timings, process.now())
        self.link = SimCoordinatorLink(self, random)
        self._keeper = SimLeaseKeeper(
            client, keys.node(identity.node), self._record, timings, random, self._lease_changed
        )
        self._inbox: deque[core.Event] = deque()
        self._handling = False
        self._streams: dict[core.StreamId, Side] = {}
        self._streams_made = 0
        self._processes: dict[core.DeviceId, SimRank] = {}
        self._leaving = False
        process.spawn(self._live(random))
        process.spawn(self._tick())
        network.listen(identity.serve_address, process, self._accept)

    @property
    def name(self) -> str:
        return self.process.name

    def rank_on(self, device: str) -> SimRank | None:
        """The device's living rank process."""
        rank = self._processes.get(device)
        return rank if rank is not None and rank.alive else None

    # ------------------------------------------------------------ life

    async def _live(self, random: Random) -> None:
        backoff = Backoff(self.timings, random)
        while True:
            try:
                await self._keeper.start()
                break
            except (EtcdUnavailable, EtcdLeaseGone):
                await self.process.sleep(backoff.next())
            except Rejected as refusal:
                # The name is another's: the real daemon exits, and whoever started it starts it again.
                self.process.kernel.tell(self.name, "registration_refused", reason=refusal.reason.text)
                await self.process.sleep(self.timings.lease_ttl)
        self.post(core.LeaseGranted(self._keeper.lease))
        self.process.spawn(self._keeper.run())
        self.process.spawn(self.leader.run())
        self.process.spawn(self.link.run())

    def _record(self, lease: int) -> NodeRecord:
        me = self.identity
        return NodeRecord(
            node=me.node,
            incarnation=me.incarnation,
            serve_address=me.serve_address,
            host=me.host,
            pid=me.pid,
            boot_id=me.boot_id,
            lease_id=lease,
        )

    def _lease_changed(self, event: LeaseEvent) -> None:
        if event.kind is LeaseEventKind.GONE:
            self.post(core.LeaseGone())
        elif event.kind is LeaseEventKind.RELET:
            self.post(core.LeaseGranted(event.lease))

    def stop(self) -> None:
        """An operator's SIGTERM."""
        self.post(core.StopAsked(Reason(kind=ReasonKind.DRAINING, text="stopped", node=self.identity.node)))

    async def _depart(self) -> None:
        """Streams first, then the session, the lease, and the listener last."""
        self._leaving = True
        for side in list(self._streams.values()):
            side.close()
        self.link.end()
        await self.process.sleep(self.timings.reconnect_min)
        for rank in self._processes.values():
            rank.die()
        await self._keeper.close()
        self.network.unlisten(self.identity.serve_address, self.process)
        self.process.kernel.tell(self.name, "departed")
        self.process.kill()
        self.network.killed(self.process, 0.0)

    async def _tick(self) -> None:
        interval = self.timings.heartbeat_interval / TICKS_PER_HEARTBEAT
        due = self.process.now()
        while True:
            lag = self.process.now() - due
            self.post(core.Tick(self._samples(), max(0.0, lag)))
            due = self.process.now() + interval
            await self.process.sleep(interval)

    # ------------------------------------------------------------ the core

    def post(self, event: core.Event) -> None:
        self._inbox.append(event)
        if self._handling or self._leaving:
            return
        self._handling = True
        while self._inbox:
            self._one(self._inbox.popleft())
        self._handling = False

    def _one(self, event: core.Event) -> None:
        def act() -> list[core.Effect]:
            return step(self.state, event, self.process.now())

        for effect in self.watcher.worker_step(self, event, act):
            self._perform(effect)

    def _perform(self, effect: core.Effect) -> None:
        match effect:
            case core.SendGateway(stream, body):
                if (side := self._streams.get(stream)) is not None:
                    side.send(body)
                    if side.idle:
                        self.process.soon(self.post, core.GatewayWritable(stream))
            case core.SendRank(device, frame):
                if (rank := self.rank_on(device)) is not None:
                    rank.hear(frame)
            case core.SendLeader(link, body):
                self.link.send(link, body)
            case core.LeaveLeader(link, _, highest_term, address):
                self.link.leave(link, highest_term, address)
            case core.HintLeader(address, term):
                self.leader.hint(address, term)
            case core.CloseGateway(stream, _):
                if (side := self._streams.get(stream)) is not None:
                    side.close()
                    self.process.soon(self._stream_ended, stream)
            case core.SpawnRank(device):
                self.process.later(self.process.kernel.random.uniform(*FORK_S), self._fork, device)
            case core.MarkEpochsOver(device, epoch):
                if (rank := self.rank_on(device)) is not None:
                    rank.mark_over(epoch)
            case core.KillRank(device, pid, _):
                rank = self.rank_on(device)
                if rank is not None and rank.pid == pid:
                    rank.die(signal=9)
            case core.RenewLease():
                self._keeper.relet()
            case core.Depart():
                self.process.spawn(self._depart())
            case core.Recorded():
                pass

    # ------------------------------------------------------------ ranks

    def _fork(self, device: str) -> None:
        if self.ranks.forks_fail:
            reason = Reason(kind=ReasonKind.PROCESS_EXITED, text="fork failed", node=self.identity.node)
            self.post(core.RankExited(device, 0, reason))
            return
        rank = self._processes[device] = self.ranks.fork(self.process, device, self._rank_said, self._rank_gone)
        self.post(core.RankForked(device, rank.pid))

    def _rank_said(self, rank: SimRank, frame: frames.RankFrame) -> None:
        self.post(core.RankSaid(rank.device, rank.pid, frame))

    def _rank_gone(self, rank: SimRank, code: int | None, signal: int | None) -> None:
        reason = Reason(kind=ReasonKind.PROCESS_EXITED, text=f"{rank.device} ended", node=self.identity.node)
        self.post(core.RankExited(rank.device, rank.pid, reason, code, signal, exonerates=signal == 9))

    def _samples(self) -> dict[core.DeviceId, core.RankSample]:
        return {device: rank.sample() for device, rank in self._processes.items() if rank.alive}

    # ------------------------------------------------------------ gateways

    def _accept(self, side: Side, service: str) -> None:
        if service != "serve" or self._leaving:
            if service == "serve":
                side.close()
            return
        stream: list[core.StreamId] = []

        def take(frame: Any) -> None:
            if stream:
                self.post(core.GatewaySaid(stream[0], frame))
            elif isinstance(frame, ServeHello):
                self._streams_made += 1
                stream.append(core.StreamId(self._streams_made))
                self._streams[stream[0]] = side
                self.post(core.GatewayOpened(stream[0], frame))

        side.on_frame = take
        side.on_closed = lambda: self._stream_ended(stream[0]) if stream else None
        side.on_room = lambda: self.post(core.GatewayWritable(stream[0])) if stream else None

    def _stream_ended(self, stream: core.StreamId) -> None:
        if self._streams.pop(stream, None) is not None:
            self.post(core.GatewayClosed(stream))


# ---------------------------------------------------------------- the leader


class _Link:
    """One attempt at a session."""

    def __init__(self, link: core.LinkId, address: str, term: Term, reader: Reader) -> None:
        self.link = link
        self.address = address
        self.welcomed = False
        self.reader = reader
        self._term = term
        self._session = SessionId(0)
        self._sent = 0
        self._received = 0

    def send(self, body: AttachUp) -> None:
        self._sent += 1
        head = Head(term=self._term, session=self._session, seq=self._sent, ack=self._received)
        self.reader.side.send((head, body))

    def note_received(self, head: Head, body: object) -> None:
        self._received = max(self._received, head.seq)
        if isinstance(body, WorkerWelcome):
            self._term, self._session, self.welcomed = body.term, body.session, True


class SimCoordinatorLink:
    """Faithful to CoordinatorLink: keeps one link to the leader alive, for ever."""

    def __init__(self, worker: SimWorker, random: Random) -> None:
        self._worker = worker
        self._process = worker.process
        self._leader = worker.leader
        self._timings = worker.timings
        self._backoff = Backoff(worker.timings, random)
        self._current: _Link | None = None
        self._links = 0
        self._said = ""
        self._ending = False

    def send(self, link: core.LinkId, body: AttachUp) -> None:
        if self._current is not None and self._current.link == link:
            self._current.send(body)

    def leave(self, link: core.LinkId, highest_term: Term, address: str) -> None:
        self._leader.hint(address, highest_term)
        if self._current is not None and self._current.link == link:
            self._said = address if address != self._current.address else ""
            self._current.reader.side.close()
            self._current.reader.pending().set()

    def end(self) -> None:
        self._ending = True
        if self._current is not None:
            self._current.reader.side.close()

    async def run(self) -> None:
        self._process.spawn(self._keep_terms())
        while not self._ending:
            address = await self._address()
            await self._attempt(address)
            known = bool(self._said) or self._leader.addresses[:1] not in ((), (address,))
            if not self._ending and not known:
                await self._process.first(self._leader.next_change(), timeout=self._backoff.next())

    async def _keep_terms(self) -> None:
        while True:
            current, highest = self._leader.current, self._leader.highest_term
            address = current.address if current is not None and current.term == highest else ""
            self._worker.post(core.TermSeen(highest, address))
            await self._leader.changed()

    async def _address(self) -> str:
        if self._said:
            said, self._said = self._said, ""
            return said
        while not self._leader.addresses:
            await self._leader.changed()
        return self._leader.addresses[0]

    async def _attempt(self, address: str) -> None:
        """One link from dial to end."""
        self._links += 1
        try:
            side = await dial(self._process, self._worker.network, address, "attach", self._timings.stage)
        except StreamEnded:
            return
        link = self._current = _Link(core.LinkId(self._links), address, self._leader.highest_term, Reader(side))
        self._worker.post(core.LeaderOpened(link.link, address))
        tasks: list[Task] = [self._process.spawn(work) for work in (self._read(link), self._moved(address))]
        tasks.append(self._process.spawn(self._greet(link)))
        await self._process.first(*tasks)
        for task in tasks:
            task.cancel()
        side.close()
        self._current = None
        self._worker.post(core.LeaderClosed(link.link))

    async def _moved(self, address: str) -> None:
        before = self._leader.addresses[:1]
        while self._leader.addresses[:1] in ((), before, (address,)):
            await self._leader.changed()

    async def _greet(self, link: _Link) -> None:
        await self._process.sleep(self._timings.stage)
        if link.welcomed:
            await self._process.timeout(float("inf"))

    async def _read(self, link: _Link) -> None:
        try:
            while True:
                head, body = await link.reader.read()
                if not link.welcomed:
                    self._backoff.reset()
                link.note_received(head, body)
                self._worker.post(core.LeaderSaid(link.link, head, body))
        except StreamEnded:
            return
