"""The gateway's shell as a model: the real Requests, with modelled links to the leader and to workers."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from controlplane.gateway.leader_link import GatewayIdentity
from controlplane.gateway.messages import ResumeAsked, ShadowFound
from controlplane.gateway.metrics import GatewayMetrics
from controlplane.gateway.requests import Requests
from controlplane.gateway.state import GatewayState, JournalLimits
from controlplane.gateway.step import step
from controlplane.runtime.ids import RequestId
from controlplane.runtime.timing import Timings
from tools.sim.electing import SimLeaderWatch
from tools.sim.gateway_links import SimLeaderLink, SimWorkerStreams
from tools.sim.network import Network
from tools.sim.process import Future, Process
from tools.sim.watching import Watcher


class _Answer:
    """Stands where the real one waits with a future of its loop."""

    def __init__(self) -> None:
        self.future = Future()

    def done(self) -> bool:
        return self.future.done

    def set_result(self, found: ShadowFound) -> None:
        self.future.set(found)


class SimRequests(Requests):
    """The real owner of the journals; every step is watched."""

    def __init__(self, gateway: SimGateway) -> None:
        state = GatewayState(timings=gateway.timings, limits=JournalLimits())
        metrics = GatewayMetrics(CollectorRegistry())
        super().__init__(state, gateway.process, metrics, lambda: None)
        self._gateway = gateway

    def _post(self, event: Any) -> None:
        self._events.append(event)
        if self._stepping:
            return
        self._stepping = True
        while self._events:
            self._one(self._events.popleft())
        self._stepping = False

    def seek(self, request: RequestId) -> Future:
        """As `find`: the ShadowFound of a claimed stream."""
        answer = _Answer()
        self._finding[request] = answer  # pyright: ignore[reportArgumentType]
        self._post(ResumeAsked(request))
        return answer.future

    def sought(self, request: RequestId) -> None:
        del self._finding[request]

    def _one(self, event: Any) -> None:
        def act() -> list[Any]:
            return step(self.state, event, self._clock.now())

        for effect in self._gateway.watcher.gateway_step(self._gateway, event, act):
            self._perform(effect)


class SimGateway:
    """One process's gateway."""

    def __init__(
        self,
        process: Process,
        network: Network,
        leader: SimLeaderWatch,
        identity: GatewayIdentity,
        timings: Timings,
        watcher: Watcher,
    ) -> None:
        self.process = process
        self.network = network
        self.leader = leader
        self.identity = identity
        self.timings = timings
        self.watcher = watcher
        # It was told to go: it takes no clients any more.
        self.leaving = False
        self.requests = SimRequests(self)
        self.link = SimLeaderLink(self)
        self.workers = SimWorkerStreams(self)
        self.requests.attach(self.link, self.workers)  # pyright: ignore[reportArgumentType]
        process.spawn(self.link.run())
        process.spawn(self._tick())

    @property
    def open(self) -> bool:
        """It takes clients."""
        return self.process.alive and not self.leaving

    @property
    def state(self) -> GatewayState:
        return self.requests.state

    def end(self) -> None:
        """The process leaves: what runs stays at its workers, for other gateways to resume."""
        self.leaving = True
        self.requests.release()
        self.link.leave()
        self.workers.leave()

    async def _tick(self) -> None:
        while True:
            await self.process.sleep(self.timings.reconnect_min)
            self.requests.tick()
