"""The simulated cluster: control planes with gateways, worker daemons with ranks, etcd, the network, clients."""

from __future__ import annotations

from dataclasses import dataclass, replace

from controlplane.core.messages import ApplyAsked, CancelAsked, DrainAsked, UndrainAsked
from controlplane.core.state import Limits
from controlplane.gateway.leader_link import GatewayIdentity
from controlplane.runtime.ids import ClusterId, DeploymentId, GatewayId, Incarnation, NodeId, RequestId
from controlplane.runtime.keys import Keys
from controlplane.runtime.messages.common import Device, ParallelDegrees, ReplicaSpec
from controlplane.runtime.records import DeploymentRecord, PeerRecord
from controlplane.runtime.timing import derive_timings
from dataplane.core.state import Identity
from tools.sim.clients import Crowd
from tools.sim.electing import SimLeaderWatch
from tools.sim.etcd import Content, Etcd
from tools.sim.etcd_client import SimEtcdClient
from tools.sim.gateway import SimGateway
from tools.sim.kernel import Kernel
from tools.sim.leader import SimCoordinator
from tools.sim.network import Network, Side
from tools.sim.process import Process
from tools.sim.ranks import RankHouse
from tools.sim.safety import Safety
from tools.sim.story import Story
from tools.sim.worker import SimWorker

CLUSTER = ClusterId("c" * 32)
KEYS = Keys("sim")
DRIFT = 0.005
"""Clocks run up to half a percent fast or slow; real ones a hundred times less."""
RANKS_DIE_AFTER_S = 0.003
WAKES_WITHIN_S = 0.8
STOP_GRACE_S = 0.5
"""A server that stops lets open streams be for so long; its port refuses at once."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a world is."""

    control_planes: int = 3
    workers: int = 3
    devices: int = 2
    replicas: int = 3
    tensor: int = 1
    pipeline: int = 1
    # 1: what has no place at its full degrees is served with fewer ranks meanwhile.
    elastic: int = 0
    # Free devices that are to keep a shard ready.
    spares: int = 0

    @property
    def ranks(self) -> int:
        """Of one replica."""
        return self.tensor * self.pipeline

    @property
    def room(self) -> int:
        """Replicas that have a place."""
        return self.workers * self.devices // self.ranks

    def deployment(self) -> DeploymentRecord:
        spec = ReplicaSpec(
            deployment=DeploymentId("m"),
            model_path="m",
            degrees=ParallelDegrees(tensor=self.tensor, pipeline=self.pipeline),
            max_sequences=4,
            max_batch_tokens=32,
        )
        strategy = "elastic_scaling" if self.elastic else "checkpoint_restart"
        return DeploymentRecord(
            deployment=DeploymentId("m"),
            model="m",
            spec=spec,
            replicas=self.replicas,
            recovery_strategy=strategy,
            spares=self.spares,
        )


class ControlPlane:
    """One control-plane process: a candidate coordinator and a gateway."""

    def __init__(self, world: World, name: str) -> None:
        self.process = world.new_process(name)
        client = SimEtcdClient(self.process, world.etcd, world.network, world.timings)
        self.leader = SimLeaderWatch(client, KEYS, world.timings, world.kernel.random)
        incarnation, address = world.draw_incarnation(), f"{name}:1"
        peer = PeerRecord(name=name, incarnation=incarnation, address=address, url="", pid=1)
        self.coordinator = SimCoordinator(
            self.process,
            client,
            world.network,
            self.leader,
            peer,
            CLUSTER,
            KEYS,
            world.timings,
            world.safety,
            world.wanted,
            world.limits,
        )
        identity = GatewayIdentity(CLUSTER, GatewayId(name), incarnation, f"http://{name}", 1, name)
        self.gateway = SimGateway(self.process, world.network, self.leader, identity, world.timings, world.safety)
        self.process.spawn(self.leader.run())
        world.network.listen(address, self.process, self._accept)

        self._network = world.network
        self._address = address
        self._leaving = False

    def _accept(self, side: Side, service: str) -> None:
        if self._leaving:
            side.close()
        elif service in ("attach", "route"):
            self.coordinator.accept(side)

    def leave(self) -> None:
        """Told to go: streams end first, then leadership and lease are given back, and the listener goes last."""
        if not self._leaving:
            self._leaving = True
            self.process.cancel_tasks()
            self.gateway.end()
            self.coordinator.end()
            self.process.spawn(self._depart())

    async def _depart(self) -> None:
        await self.coordinator.election.close()
        self._network.unlisten(self._address, self.process)
        await self.process.sleep(STOP_GRACE_S)
        self.process.kernel.tell(self.process.name, "departed")
        self.process.kill()
        self._network.killed(self.process, 0.0)


class World:
    """One run."""

    def __init__(self, seed: int, shape: Shape) -> None:
        self.seed = seed
        self.shape = shape
        self.story = Story()
        self.kernel = Kernel(seed, self.story)
        self.timings = derive_timings()
        self.limits = Limits()
        self.network = Network(self.kernel)
        self.etcd = Etcd(self.kernel)
        self.house = RankHouse(self.kernel)
        self.crowd = Crowd(self.kernel, self.holders)
        self.safety = Safety(self, KEYS)
        self.etcd.on_txn = self.safety.txn
        self.wanted = shape.deployment()
        self.snapshots: list[Content] = []
        self.control_planes: dict[str, ControlPlane] = {}
        self.workers: dict[str, SimWorker] = {}
        self._incarnations = 0
        for number in range(1, shape.control_planes + 1):
            self.start_control_plane(f"cp{number}")
        for number in range(1, shape.workers + 1):
            self.start_worker(f"w{number}")

    # ------------------------------------------------------------ processes

    def new_process(self, name: str) -> Process:
        return Process(self.kernel, name, name, rate=self.kernel.random.uniform(1 - DRIFT, 1 + DRIFT))

    def draw_incarnation(self) -> Incarnation:
        self._incarnations += 1
        return Incarnation(f"{self._incarnations:08x}{self.kernel.random.getrandbits(96):024x}")

    def start_control_plane(self, name: str) -> None:
        self.kernel.tell(name, "started")
        self.control_planes[name] = ControlPlane(self, name)

    def start_worker(self, name: str) -> None:
        self.kernel.tell(name, "started")
        process = self.new_process(name)
        identity = Identity(
            cluster=CLUSTER,
            node=NodeId(name),
            incarnation=self.draw_incarnation(),
            serve_address=f"{name}:2",
            boot_id="",
            host=name,
            pid=2,
            devices=tuple(Device(id=f"cpu:{index}") for index in range(self.shape.devices)),
        )
        client = SimEtcdClient(process, self.etcd, self.network, self.timings)
        self.workers[name] = SimWorker(
            process, client, self.network, KEYS, identity, self.timings, self.safety, self.house
        )

    def process(self, name: str) -> Process | None:
        """The living process of that name."""
        holder = self.control_planes.get(name) or self.workers.get(name)
        return holder.process if holder is not None and holder.process.alive else None

    def kill(self, name: str, *, eof_after: float | None = 0.0) -> None:
        """SIGKILL; or its machine is gone (None), so that nobody says so."""
        process = self.process(name)
        if process is None:
            return
        process.kill()
        self.network.killed(process, eof_after)
        self.kernel.tell(name, "killed")
        if (control_plane := self.control_planes.get(name)) is not None:
            self.crowd.gateway_died(control_plane.gateway, self.gateways())
            self.safety.process_died(control_plane)
        for rank in self.house.of_daemon(process):
            self.kernel.after(RANKS_DIE_AFTER_S, rank.die)

    def leave(self, name: str) -> None:
        """It is asked to go, and does so in order."""
        process = self.process(name)
        if process is None:
            return
        self.kernel.tell(name, "told_to_leave")
        if (control_plane := self.control_planes.get(name)) is not None:
            process.run(self._leave, control_plane)
        else:
            process.run(self.workers[name].stop)

    def _leave(self, control_plane: ControlPlane) -> None:
        control_plane.leave()
        self.crowd.gateway_died(control_plane.gateway, self.gateways())
        self.safety.process_died(control_plane)

    def restart(self, name: str) -> None:
        """Start it anew, with nothing remembered; a no-op while it lives."""
        if self.process(name) is None:
            if name in self.control_planes:
                self.start_control_plane(name)
            else:
                self.start_worker(name)

    def stop(self, name: str, *, hung: bool = False) -> None:
        process = self.process(name)
        if process is not None and not (process.stopped or process.hung):
            process.stop(hung=hung)
            if not hung:
                self.network.stopped(process)

    def go_on(self, name: str) -> None:
        process = self.process(name)
        if process is not None and (process.stopped or process.hung):
            process.go_on()

    def pause(self, hosts: list[str]) -> None:
        """Machines stand still: whatever runs there."""
        for rank in self.house.all:
            if rank.host in hosts:
                rank.pause()
        for name in hosts:
            process = self.process(name)
            if process is not None:
                process.pause()
                self.network.stopped(process)

    def unpause(self, hosts: list[str]) -> None:
        for name in hosts:
            process = self.process(name)
            if process is not None:
                process.unpause()
        for rank in self.house.all:
            if rank.host in hosts and rank.paused:
                # What it computed for is not done in its sleep.
                self.kernel.after(self.kernel.random.uniform(0, WAKES_WITHIN_S), rank.unpause)

    # ------------------------------------------------------------ who is what

    def leaders(self) -> list[SimCoordinator]:
        """Those who think that they lead, the highest term first."""
        lead = [one.coordinator for one in self.control_planes.values() if one.process.alive]
        return sorted((one for one in lead if one.state is not None), key=lambda one: -(one.term or 0))

    def leader(self) -> SimCoordinator | None:
        """The leader of the highest term."""
        return next(iter(self.leaders()), None)

    def gateways(self) -> list[SimGateway]:
        """Those that take clients."""
        return [one.gateway for one in self.control_planes.values() if one.gateway.open]

    def holders(self, request: RequestId) -> list[SimWorker]:
        """Running workers that hold the request's shadow."""
        running = [worker for worker in self.workers.values() if worker.process.runs]
        return [worker for worker in running if request in worker.state.requests]

    def hosts(self) -> list[str]:
        return [*self.control_planes, *self.workers]

    def ask_leader(self, body: DrainAsked | UndrainAsked | CancelAsked | ApplyAsked) -> None:
        """An operator's wish, to whoever leads; lost if nobody does."""
        leader = self.leader()
        if leader is not None:
            leader.process.run(leader.take_wish, body)

    def scale(self, replicas: int) -> None:
        """Want so many replicas."""
        self._want(replace(self.wanted, replicas=replicas))

    def respec(self, max_sequences: int) -> None:
        """Want all replicas replaced by ones of another spec."""
        self._want(replace(self.wanted, spec=replace(self.wanted.spec, max_sequences=max_sequences)))

    def _want(self, wanted: DeploymentRecord) -> None:
        self.wanted = wanted
        self.ask_leader(ApplyAsked(wanted))

    # ------------------------------------------------------------ healing

    def heal(self) -> None:
        """Everything that is broken works again, and every process runs."""
        self.network.heal_all()
        self.etcd.heal()
        self.house.forks_fail = False
        self.unpause(self.hosts())
        for name in self.hosts():
            self.go_on(name)
            self.restart(name)
        for rank in self.house.all:
            # One that is stuck or stopped stays so: to find and to kill it is the cluster's task.
            rank.slow, rank.late = 1.0, 0.0
        if not self.wanted.replicas:
            self.scale(1)
        self.kernel.tell("world", "healed")

    def end(self) -> None:
        """Nothing happens any more."""
        for name in self.hosts():
            if (process := self.process(name)) is not None:
                process.kill()
