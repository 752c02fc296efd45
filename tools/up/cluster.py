"""A local cluster's life: etcd, control planes, workers; watched while they run, stopped in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress

from controlplane.config import ClusterConfig
from controlplane.runtime.errors import PerdureError
from controlplane.runtime.etcd_server import EtcdChild
from tools.up.desired import apply_deployment, forget_other_timing
from tools.up.display import Display
from tools.up.plan import controlplane_specs, reachable, worker_specs
from tools.up.process import Child, ChildFailed, ChildSpec, describe_exit
from tools.up.readiness import wait_ready
from tools.up.state import RunningCluster, StateDir


class LocalCluster:
    """The processes of one local cluster. Owned by one `perdure up`."""

    def __init__(self, config: ClusterConfig, state: StateDir, notice: Callable[[str], None]) -> None:
        """`config` is fitted to this machine; `notice` takes a line for people when a process dies or is back."""
        self.config = config
        self._state = state
        self._notice = notice
        self._timings = config.timings()
        self._etcd: EtcdChild | None = None
        if not config.cluster.etcd.endpoints:
            self._etcd = EtcdChild(data_dir=state.etcd, log_path=state.logs / "etcd.log", timings=self._timings)
        self._controlplanes: list[Child] = []
        self._workers: list[Child] = []
        self._supervision: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start every process, each watched from its start; workers come when the deployment stands in etcd.

        Raises PerdureError (etcd), ChildFailed or DeploymentRefused.
        """
        if self._etcd is not None:
            await self._etcd.start()
            await forget_other_timing(self._etcd.endpoint, self.config)
            self._watch(self._supervise_etcd(self._etcd))
        self._state.config.write_text(self.config.with_etcd(self.etcd_endpoints).to_yaml())
        self._controlplanes = [self._child(spec) for spec in controlplane_specs(self.config, self._state)]
        self._workers = [self._child(spec) for spec in worker_specs(self.config, self._state)]
        await self._start(self._controlplanes)
        await self._or_failure(apply_deployment(self.addresses, self.config))
        await self._start(self._workers)

    async def until_ready(self, display: Display) -> None:
        """Wait until every replica and gateway is ready. Raises ChildFailed or ModelRefused."""
        await self._or_failure(wait_ready(self.addresses, self.urls, self.config, display))

    async def until_failure(self) -> None:
        """Wait, for ever if all goes well. Raises ChildFailed when a process cannot be kept alive."""
        done, _ = await asyncio.wait(self._supervision, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Stop workers, then control planes, then etcd; nothing is left afterwards."""
        await self._stop_watching()
        patience_s = self._timings.failure_timeout
        for group in (self._workers, self._controlplanes):
            await asyncio.gather(*(child.stop(patience_s) for child in group))
        if self._etcd is not None:
            await self._etcd.stop()

    def kill(self) -> None:
        """SIGKILL to every daemon, at once; `stop` then has little left to do."""
        for child in [*self._workers, *self._controlplanes]:
            child.kill()

    @property
    def etcd_endpoints(self) -> list[str]:
        return [self._etcd.endpoint] if self._etcd is not None else list(self.config.cluster.etcd.endpoints)

    @property
    def addresses(self) -> list[str]:
        """host:port of each control plane's gRPC server, as seen from here."""
        return [f"{reachable(process.host)}:{process.port}" for process in self.config.cluster.controlplanes]

    @property
    def urls(self) -> list[str]:
        """Base URL of each gateway, as seen from here."""
        return [
            f"http://{reachable(process.host)}:{process.http_port}" for process in self.config.cluster.controlplanes
        ]

    def running(self, pid: int) -> RunningCluster:
        """What others may know of this cluster; `pid` is ours."""
        children = {child.spec.name: child.pid for child in [*self._controlplanes, *self._workers]}
        if self._etcd is not None:
            children["etcd"] = self._etcd.pid
        return RunningCluster(
            cluster=self.config.cluster.name,
            pid=pid,
            urls=self.urls,
            addresses=self.addresses,
            etcd=self.etcd_endpoints,
            model=self.config.model_name,
            processes={name: child for name, child in children.items() if child is not None},
        )

    def _child(self, spec: ChildSpec) -> Child:
        return Child(spec, self._timings, self._notice)

    def _watch(self, supervision: Coroutine[None, None, None]) -> None:
        self._supervision.append(asyncio.create_task(supervision))

    async def _stop_watching(self) -> None:
        for task in self._supervision:
            task.cancel()
        for task in self._supervision:
            with suppress(asyncio.CancelledError, ChildFailed, PerdureError):
                await task
        self._supervision.clear()

    async def _start(self, children: list[Child]) -> None:
        for child in children:
            await child.start()
            self._watch(child.supervise())

    async def _or_failure(self, work: Coroutine[None, None, None]) -> None:
        """Do `work`, unless a process fails for good before it is done."""
        task, failure = asyncio.create_task(work), asyncio.create_task(self.until_failure())
        try:
            done, _ = await asyncio.wait({task, failure}, return_when=asyncio.FIRST_COMPLETED)
            for first in done:
                first.result()
        finally:
            task.cancel()
            failure.cancel()
            await asyncio.wait({task, failure})

    async def _supervise_etcd(self, etcd: EtcdChild) -> None:
        """As Child.supervise: the cluster serves on without etcd, but cannot change until it is back."""
        while True:
            self._notice(f"etcd {describe_exit(await etcd.wait())}; starting it again")
            await etcd.start()
            self._notice(f"etcd is back, pid {etcd.pid}")
