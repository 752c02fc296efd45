"""The processes of the world: real shells put together as their own `main` does, without HTTP and rank processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import grpc.aio
from prometheus_client import CollectorRegistry

from controlplane.coordinator import Coordinator, Identity
from controlplane.core.entities import Limits
from controlplane.core.messages import Recorded
from controlplane.election import Election
from controlplane.event_log import EventLog
from controlplane.gateway.leader_link import GatewayIdentity, LeaderLink
from controlplane.gateway.messages import WorkerKey
from controlplane.gateway.metrics import GatewayMetrics
from controlplane.gateway.requests import Requests
from controlplane.gateway.state import GatewayState, JournalLimits
from controlplane.gateway.worker_stream import WorkerStream
from controlplane.gateway.worker_streams import WorkerStreams
from controlplane.leader_stream import SessionStreams
from controlplane.metrics import CoordinatorMetrics
from controlplane.route_link import RoutingServicer
from controlplane.runtime.actor import supervise
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.errors import Retryable
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.ids import ClusterId, Epoch, GatewayId, Incarnation, NodeId, Term
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.lease import NameTaken
from controlplane.runtime.messages.common import Device, Reason, ReasonKind
from controlplane.runtime.probe import refused_twice
from controlplane.runtime.records import PeerRecord
from controlplane.runtime.timing import Timings
from controlplane.store import Store
from controlplane.worker_link import SessionServicer
from dataplane import frames
from dataplane.config import WorkerConfig
from dataplane.core import messages as core
from dataplane.core.state import Identity as WorkerIdentity
from dataplane.daemon import WorkerShell
from protos.perdure.v1 import route_pb2_grpc, session_pb2_grpc
from tools.sim.kernel import Kernel
from tools.sim.process import Process
from tools.sim.ranks import RankHouse, SimRank
from tools.sim.shells.etcd_server import ADDRESS
from tools.sim.shells.loop import LIFE, Life, VirtualClock

if TYPE_CHECKING:
    from tools.sim.shells.world import ShellWorld

ETCD = EtcdOptions(endpoints=(ADDRESS,))
FORK_S = (0.005, 0.05)


class Host:
    """One life of a process: its main task, which ends by itself when asked to stop, and at once when killed."""

    def __init__(self, world: ShellWorld, name: str) -> None:
        self.world = world
        self.name = name
        self.life = Life(name)
        token = LIFE.set(self.life)
        try:
            self.main = world.loop.create_task(self._run(), name=f"main {name}")
        finally:
            LIFE.reset(token)

    async def _run(self) -> None:
        """A process whose name is another's exits; whoever started it starts it again."""
        try:
            await self.live()
        except* NameTaken:
            self.world.kernel.tell(self.name, "registration_refused")

    async def live(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """An operator's SIGTERM."""
        self.main.cancel()


class ControlPlaneHost(Host):
    """As controlplane/process.py: a candidate coordinator and a gateway."""

    def __init__(self, world: ShellWorld, name: str) -> None:
        self.requests: Requests | None = None
        self.coordinator: Coordinator | None = None
        super().__init__(world, name)

    async def live(self) -> None:
        world, timings, clock, dice = self.world, self.world.timings, self.world.clock, self.world.dice()
        client = EtcdClient(ETCD, timings, clock)
        leader = LeaderWatch(client, world.keys, timings, clock, dice)
        incarnation, address = world.draw_incarnation(), f"{self.name}:1"
        peer = PeerRecord(name=self.name, incarnation=incarnation, address=address, url="", pid=1)
        election = Election(client, world.keys, peer, leader, timings, clock, dice)
        coordinator = self.coordinator = Coordinator(
            Identity(self.name, incarnation, world.cluster, address, 1),
            Store(client, world.keys, election, timings, clock, dice),
            election,
            timings,
            clock,
            ToldEvents(world.kernel, self.name),
            Limits(),
            CoordinatorMetrics(CollectorRegistry()),
            world.wanted,
        )
        server = grpc.aio.server()
        server.add_insecure_port(address)
        streams = SessionStreams(coordinator, leader, timings)
        session_pb2_grpc.add_SessionServicer_to_server(SessionServicer(streams), server)
        route_pb2_grpc.add_RoutingServicer_to_server(RoutingServicer(streams), server)
        await server.start()
        gateway = GatewayShell(world.cluster, self.name, incarnation, leader, timings, clock)
        self.requests = gateway.requests
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(supervise("leader_watch", leader.run, clock))
                tasks.create_task(gateway.run())
                await _patiently(election.start, timings, clock, dice)
                tasks.create_task(election.run())
                tasks.create_task(coordinator.run())
        finally:
            await election.close()
            await server.stop(timings.heartbeat_interval)
            await client.close()


class ToldEvents(EventLog):
    """The coordinator's events, in the story."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        super().__init__(VirtualClock(kernel), None)
        self._kernel = kernel
        self._name = name

    def record(self, recorded: Recorded, term: Term) -> None:
        super().record(recorded, term)
        self._kernel.tell(
            self._name,
            recorded.name,
            node=recorded.node,
            replica=recorded.replica,
            epoch=recorded.epoch or "",
            reason=recorded.reason.text if recorded.reason is not None else "",
        )


class GatewayShell:
    """As controlplane/gateway/gateway.py without HTTP: the journals' owner, the leader's link, the workers' streams."""

    def __init__(
        self,
        cluster: ClusterId,
        name: str,
        incarnation: Incarnation,
        leader: LeaderWatch,
        timings: Timings,
        clock: VirtualClock,
    ) -> None:
        self._identity = GatewayIdentity(cluster, GatewayId(name), incarnation, f"http://{name}", 1, name)
        self._leader, self._timings, self._clock = leader, timings, clock
        state = GatewayState(timings=timings, limits=JournalLimits())
        self.requests = Requests(state, clock, GatewayMetrics(CollectorRegistry()), lambda: None)
        self._tasks = asyncio.TaskGroup()
        self._workers = WorkerStreams(self._make_stream, self._tasks, clock)
        self._link = LeaderLink(self._identity, leader, timings, clock, self.requests)
        self.requests.attach(self._link, self._workers)

    async def run(self) -> None:
        async with self._tasks as tasks:
            tasks.create_task(supervise("leader_link", self._link.run, self._clock))
            tasks.create_task(supervise("gateway_ticks", self._tick, self._clock))

    async def _tick(self) -> None:
        while True:
            await self._clock.sleep(self._timings.reconnect_min)
            self.requests.tick()

    def _make_stream(self, worker: WorkerKey, node: NodeId) -> WorkerStream:
        return WorkerStream(
            worker, node, self._identity, self._leader, self._timings, self._clock, self.requests, refused_twice
        )


class WorkerHost(Host):
    """As dataplane/daemon.py: the real WorkerShell over modelled ranks."""

    def __init__(self, world: ShellWorld, name: str) -> None:
        self.shell: WorkerShell | None = None
        self.process = Process(world.kernel, name, name)
        super().__init__(world, name)

    async def live(self) -> None:
        world = self.world
        devices = tuple(f"cpu:{index}" for index in range(world.shape.devices))
        config = WorkerConfig(
            node=NodeId(self.name),
            keys=world.keys,
            etcd=ETCD,
            host=self.name,
            port=2,
            devices=devices,
            state_dir=Path("/nonexistent"),
        )
        identity = WorkerIdentity(
            cluster=world.cluster,
            node=NodeId(self.name),
            incarnation=world.draw_incarnation(),
            serve_address=f"{self.name}:2",
            boot_id="",
            host=self.name,
            pid=2,
            devices=tuple(Device(id=device) for device in devices),
        )
        shell = WorkerShell(config, world.timings, world.clock, world.dice())
        try:
            await shell.listen()
            pool: Any = HousePool.settings(world.house, self.process)
            await shell.join(identity, pool)
            self.shell = shell
            await shell.run()
        finally:
            await shell.end()

    def stop(self) -> None:
        if self.shell is not None:
            self.shell.post(core.StopAsked(Reason(kind=ReasonKind.DRAINING, text="stopped", node=NodeId(self.name))))
        else:
            self.main.cancel()


class HousePool:
    """In place of RankPool: modelled ranks instead of processes."""

    @staticmethod
    def settings(house: RankHouse, daemon: Process) -> tuple[RankHouse, Process]:
        return house, daemon

    def __init__(
        self,
        settings: tuple[RankHouse, Process],
        cluster: ClusterId,
        timings: Timings,
        clock: VirtualClock,
        post: Callable[[core.Event], None],
    ) -> None:
        self._house, self._daemon = settings
        self._post = post
        self._ranks: dict[str, SimRank] = {}

    async def start(self) -> None:
        pass

    async def run(self) -> None:
        """Eternal: there is no zygote that could die."""
        await asyncio.Event().wait()

    def stop(self) -> None:
        for rank in self._ranks.values():
            rank.die(signal=9)
        self._daemon.kill()

    def spawn(self, device: str) -> None:
        self._house.kernel.after(self._house.kernel.random.uniform(*FORK_S), self._daemon.run, self._fork, device)

    def send(self, device: str, frame: frames.DaemonFrame) -> None:
        if (rank := self.rank_on(device)) is not None:
            rank.hear(frame)

    def mark_epochs_over(self, device: str, epoch: Epoch) -> None:
        if (rank := self.rank_on(device)) is not None:
            rank.mark_over(epoch)

    def kill(self, device: str, pid: int, reason: Reason) -> None:
        rank = self.rank_on(device)
        if rank is not None and rank.pid == pid:
            rank.die(signal=9)

    def samples(self) -> Mapping[str, core.RankSample]:
        return {device: rank.sample() for device, rank in self._ranks.items() if rank.alive}

    def rank_on(self, device: str) -> SimRank | None:
        """The device's living rank."""
        rank = self._ranks.get(device)
        return rank if rank is not None and rank.alive else None

    def _fork(self, device: str) -> None:
        rank = self._ranks[device] = self._house.fork(self._daemon, device, self._said, self._gone)
        self._post(core.RankForked(device, rank.pid))

    def _said(self, rank: SimRank, frame: frames.RankFrame) -> None:
        self._post(core.RankSaid(rank.device, rank.pid, frame))

    def _gone(self, rank: SimRank, code: int | None, signal: int | None) -> None:
        reason = Reason(kind=ReasonKind.PROCESS_EXITED, text=f"{rank.device} ended", node=NodeId(self._daemon.name))
        self._post(core.RankExited(rank.device, rank.pid, reason, code, signal, exonerates=signal == 9))


async def _patiently(start: Callable[[], Any], timings: Timings, clock: VirtualClock, dice: Random) -> None:
    """For as long as etcd is away."""
    backoff = Backoff(timings, dice)
    while True:
        try:
            await start()
            return
        except Retryable:
            await clock.sleep(backoff.next())
