"""The world of the real shells: control planes and worker daemons on one virtual-time loop, etcd, wires, clients."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any

from controlplane.core.messages import ApplyAsked
from controlplane.core.state import ClusterState
from controlplane.runtime.errors import Retryable
from controlplane.runtime.ids import Incarnation
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.timing import derive_timings
from tools.sim.etcd import Etcd
from tools.sim.kernel import Kernel
from tools.sim.ranks import RankHouse
from tools.sim.shells.crowd import Crowd
from tools.sim.shells.etcd_server import ADDRESS, EtcdServer
from tools.sim.shells.hosts import ControlPlaneHost, Host, WorkerHost
from tools.sim.shells.loop import LIFE, Life, VirtualClock, VirtualLoop
from tools.sim.shells.watch import Sleepers
from tools.sim.shells.wires import Server, Wires
from tools.sim.story import Story
from tools.sim.world import CLUSTER, KEYS, RANKS_DIE_AFTER_S, Shape

ENDS_WITHIN_S = 6.0
"""Virtual seconds in which every task of a process that was stopped or killed is over: two silences of its links, a
last call to etcd, a server's grace."""


class ShellWorld:
    """One run."""

    def __init__(self, seed: int, shape: Shape) -> None:
        self.shape = shape
        self.story = Story()
        self.kernel = Kernel(seed, self.story)
        self.sleepers = Sleepers(self.kernel)
        self.loop = VirtualLoop(self.kernel, self.sleepers.check)
        self.wires = Wires(self.kernel, self.loop)
        self.clock = VirtualClock(self.kernel)
        self.timings = derive_timings()
        self.etcd = Etcd(self.kernel)
        self.house = RankHouse(self.kernel)
        self.crowd = Crowd(self)
        self.keys, self.cluster, self.wanted = KEYS, CLUSTER, shape.deployment()
        self.hosts: dict[str, Host] = {}
        self.failed: BaseException | None = None
        self.over = False
        self._etcd_server = Server(self.wires)
        self._incarnations = 0
        self.loop.set_exception_handler(self._unseen)

    def begin(self) -> None:
        EtcdServer(self.etcd, self._etcd_server)
        self._etcd_server.listening = True
        for number in range(1, self.shape.control_planes + 1):
            self.start(f"cp{number}")
        for number in range(1, self.shape.workers + 1):
            self.start(f"w{number}")

    def dice(self) -> Random:
        return Random(self.kernel.random.getrandbits(64))

    def draw_incarnation(self) -> Incarnation:
        self._incarnations += 1
        return Incarnation(f"{self._incarnations:08x}{self.kernel.random.getrandbits(96):024x}")

    def spawn(self, work: Coroutine[Any, Any, None], life: Life) -> asyncio.Task[None]:
        """A task of that process. What it raises ends the run."""
        token = LIFE.set(life)
        try:
            task = self.loop.create_task(work)
        finally:
            LIFE.reset(token)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _unseen(self, loop: Any, context: dict[str, Any]) -> None:
        """An exception that nobody looked at, or a callback's."""
        self._fail(context.get("exception") or AssertionError(context["message"]))

    def _fail(self, error: BaseException) -> None:
        self.failed = self.failed or error
        self.loop.stop()

    # ------------------------------------------------------------ processes

    def start(self, name: str) -> None:
        """Start it, with nothing remembered; a no-op while it lives, and once all are to go."""
        held = self.hosts.get(name)
        if self.over or (held is not None and held.life.alive):
            return
        self.kernel.tell(name, "started")
        host = self.hosts[name] = ControlPlaneHost(self, name) if name.startswith("cp") else WorkerHost(self, name)
        host.main.add_done_callback(lambda task: self._ended(host, task))

    def _ended(self, host: Host, task: asyncio.Task[Any]) -> None:
        """It left by itself, or was killed: nothing of it may be left a while later."""
        self.kernel.tell(host.name, "ended")
        host.life.alive = False
        self._end_clients(host.life)
        self.kernel.after(ENDS_WITHIN_S, self._expect_nothing_of, host)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def kill(self, name: str) -> None:
        """Its peers hear at once; whatever its tasks still do reaches nobody, and they must end."""
        host = self.hosts[name]
        if not host.life.alive:
            return
        self.kernel.tell(name, "killed")
        host.life.alive = False
        for address, server in self.wires.servers.items():
            if address.startswith(f"{name}:"):
                server.listening = False
        self.wires.break_calls(name)
        if isinstance(host, WorkerHost):
            host.process.kill()
            for rank in self.house.of_daemon(host.process):
                self.kernel.after(RANKS_DIE_AFTER_S, rank.die)
        host.main.cancel()
        self.kernel.after(ENDS_WITHIN_S, self._expect_nothing_of, host)
        self._end_clients(host.life)

    def stop(self, name: str) -> None:
        """SIGTERM: it leaves in order."""
        host = self.hosts[name]
        if host.life.alive:
            self.kernel.tell(name, "stopped")
            self._end_clients(host.life)
            host.stop()

    def _end_clients(self, life: Life) -> None:
        for task in [task for task in self.loop.tasks if task.life is life and task.get_name().startswith("Task")]:
            if getattr(task.get_coro(), "__qualname__", "") == "Crowd._attend":
                task.cancel()

    def _expect_nothing_of(self, host: Host) -> None:
        left = sorted(str(task.get_coro()) for task in self.loop.tasks if task.life is host.life)
        assert not left, f"{host.name} ended and still runs {left[0]}"

    # ------------------------------------------------------------ etcd

    def etcd_down(self) -> None:
        self._etcd_server.listening = False
        self.wires.break_calls(ADDRESS.rpartition(":")[0])
        self.etcd.go_down()

    def etcd_up(self) -> None:
        self._etcd_server.listening = True
        self.etcd.come_up()

    # ------------------------------------------------------------ who is what

    def control_planes(self) -> list[ControlPlaneHost]:
        return [host for host in self.hosts.values() if isinstance(host, ControlPlaneHost) and host.life.alive]

    def leaders(self) -> list[ControlPlaneHost]:
        return [
            one for one in self.control_planes() if one.coordinator is not None and one.coordinator.term is not None
        ]

    def operate(self) -> None:
        """An operator's wish for what is wanted: a fresh budget for what was given up."""
        for leader in self.leaders():
            self.spawn(self._wish(leader), leader.life)

    async def _wish(self, leader: ControlPlaneHost) -> None:
        assert leader.coordinator is not None
        try:
            async with asyncio.timeout(self.timings.stage):
                await leader.coordinator.ask(ApplyAsked(self.wanted))
        except (Retryable, TimeoutError):
            return

    def ailment(self) -> str | None:
        """Why all is not well yet."""
        leaders = self.leaders()
        if len(leaders) != 1 or leaders[0].coordinator is None:
            return f"{len(leaders)} lead"
        open_now = [client for client in self.crowd.clients if not client.outcome]
        if open_now:
            return f"{len(open_now)} requests are open, {open_now[0].request} for one"
        return leaders[0].coordinator.view(self._ailment_of) or self._leftover()

    def _ailment_of(self, state: ClusterState, now: float) -> str | None:
        ready = [replica for replica in state.replicas.values() if replica.phase is ReplicaPhase.READY]
        if len(ready) < self.wanted.replicas:
            return f"{len(ready)} replicas serve"
        if state.requests:
            return f"the leader still counts {sorted(state.requests)[:3]}"
        return None

    def _leftover(self) -> str | None:
        """Workers may keep for a while what a dead gateway's client might ask for."""
        cut = {client.request for client in self.crowd.clients if client.outcome == "cut"}
        for host in self.hosts.values():
            if isinstance(host, ControlPlaneHost):
                if host.requests is not None and host.life.alive and host.requests.open_requests:
                    return f"{host.name} keeps journals"
            elif isinstance(host, WorkerHost) and host.shell is not None and host.life.alive:
                state = host.shell._state  # pyright: ignore[reportPrivateUsage]
                held = state.requests.keys() - cut if state is not None else ()
                if held:
                    return f"{host.name} holds {sorted(held)[:3]}"
        return None
