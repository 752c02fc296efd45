"""The life of what one command starts: etcd, control planes, workers; watched while they run, stopped in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress

from controlplane.runtime.errors import PerdureError
from controlplane.runtime.etcd_server import EtcdChild
from tools.up.desired import apply_deployment, forget_other_timing
from tools.up.display import Display
from tools.up.plan import ClusterPlan, EtcdPlan
from tools.up.process import Child, ChildFailed, describe_exit
from tools.up.readiness import wait_ready
from tools.up.state import RunningCluster, StateDir


class LocalCluster:
    """The processes of one command. Owned by one `perdure up` or `perdure serve`."""

    def __init__(self, plan: ClusterPlan, state: StateDir, notice: Callable[[str], None]) -> None:
        """`notice` takes a line for people when a process dies or is back."""
        self._plan = plan
        self._state = state
        self._notice = notice
        self._timings = plan.config.timings()
        self._etcd = None if plan.etcd is None else self._etcd_child(plan.etcd)
        self._controlplanes = [Child(spec, self._timings, notice) for spec in plan.controlplanes]
        self._workers = [Child(spec, self._timings, notice) for spec in plan.workers]
        self._supervision: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start every process, each watched from its start; workers come when the deployment stands in etcd.

        Raises PerdureError (etcd), ChildFailed or DeploymentRefused.
        """
        if self._etcd is not None:
            await self._etcd.start()
            await forget_other_timing(self._etcd.endpoint, self._plan.config)
            self._watch(self._supervise_etcd(self._etcd))
        self._state.config.write_text(self._plan.config.with_etcd(self.etcd_endpoints).to_yaml())
        if self._controlplanes:
            await self._start(self._controlplanes)
            await self._or_failure(apply_deployment(self._plan.addresses, self._plan.config))
        await self._start(self._workers)

    async def until_ready(self, display: Display) -> None:
        """Wait until every replica and gateway is ready. Raises ChildFailed or ModelRefused."""
        await self._or_failure(wait_ready(self._plan.addresses, self._plan.urls, self._plan.config, display))

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
        return [self._etcd.endpoint] if self._etcd is not None else list(self._plan.config.cluster.etcd.endpoints)

    def running(self, pid: int) -> RunningCluster:
        """What others may know of this cluster; `pid` is ours."""
        children = {child.spec.name: child.pid for child in [*self._controlplanes, *self._workers]}
        if self._etcd is not None:
            children["etcd"] = self._etcd.pid
        return RunningCluster(
            cluster=self._plan.config.cluster.name,
            pid=pid,
            urls=list(self._plan.urls),
            addresses=list(self._plan.addresses),
            etcd=self.etcd_endpoints,
            model=self._plan.config.model_name,
            processes={name: child for name, child in children.items() if child is not None},
        )

    def _etcd_child(self, plan: EtcdPlan) -> EtcdChild:
        return EtcdChild(
            data_dir=self._state.etcd,
            log_path=self._state.logs / "etcd.log",
            timings=self._timings,
            host=plan.host,
            client_port=plan.client_port,
        )

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
