"""Carries out one fault: finds who is meant at this moment, does it, and undoes what has an end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path

from protos.perdure.v1 import common_pb2
from tools.chaos.fault import Action, Fault, Target
from tools.chaos.hosts import Hosts
from tools.chaos.live import ChaosError, LiveCluster
from tools.chaos.network import Loss
from tools.chaos.poison import poison

SIGNALS = {Action.KILL: signal.SIGKILL, Action.STOP: signal.SIGSTOP, Action.TERMINATE: signal.SIGTERM}
_LOADING = {common_pb2.REPLICA_PHASE_LOADING}
PHASES = {
    "loading": _LOADING,
    # From its new place until it serves, as a failure's timeline has it: forming alone may be over between two looks.
    "regrouping": {common_pb2.REPLICA_PHASE_PREPARING, common_pb2.REPLICA_PHASE_FORMING, *_LOADING},
}
READY = common_pb2.REPLICA_PHASE_READY
WHEN_POLL_S = 0.01
WHEN_MAX_S = 60.0
DRAIN_S = 2
"""Of a rolling restart: streams that still run then go on elsewhere."""

RETURN_MAX_S = 120.0

SLOW_PERIOD_S = 0.1


class Saboteur:
    """One for a run. `hosts`: the cluster's, if it is chaos's own."""

    def __init__(self, cluster: LiveCluster, hosts: Hosts | None, say: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._hosts = hosts
        # What happened beside the fault itself, for the report.
        self._say = say

    async def wait_for(self, when: str) -> None:
        """Return when a replica is in a phase ("loading main-0"). Raises ChaosError if it does not come there."""
        word, replica = when.split()
        deadline = asyncio.get_running_loop().time() + WHEN_MAX_S
        while asyncio.get_running_loop().time() < deadline:
            status = await self._cluster.status()
            if any(row.id == replica and row.phase in PHASES[word] for row in status.replicas):
                return
            await asyncio.sleep(WHEN_POLL_S)
        raise ChaosError(f"{replica} was not seen {word} within {WHEN_MAX_S:g} s")

    async def inflict(self, fault: Fault) -> None:
        """Return when it is over. Raises ChaosError, NetworkError or HostsError."""
        match fault.action:
            case Action.DRAIN:
                for node in await self._nodes(fault.target):
                    await self._cluster.drain(node)
            case Action.UNDRAIN:
                for node in [fault.target.name] if fault.target.name else await self._cluster.drained():
                    await self._cluster.undrain(node)
            case Action.SCALE:
                await self._cluster.scale(fault.target.name, fault.replicas)
                await self._cluster.wait_whole(RETURN_MAX_S)
            case Action.RELOAD:
                await self._reload()
            case Action.SLOW:
                await self._slow(fault)
            case Action.POISON:
                self._say(await poison(self._cluster))
            case Action.KILL | Action.STOP | Action.TERMINATE:
                await self._signal(fault)
            case Action.SAVE:
                await self._own().save_etcd()
            case Action.RESTORE:
                await self._own().restore_etcd()
            case Action.COMPACT:
                await self._own().compact_etcd()
            case Action.DENY:
                async with self._own().etcd_denying():
                    await asyncio.sleep(fault.seconds)
            case Action.JUMP:
                await self._jump(fault)
            case Action.FREEZE:
                await self._freeze(fault)
            case Action.RESTART:
                await self._restart_all()
            case _:
                async with AsyncExitStack() as disturbances:
                    for host in await self._hosts_of(fault.target):
                        await disturbances.enter_async_context(self._disturbed(fault, host))
                    await asyncio.sleep(fault.seconds)

    async def check(self, fault: Fault) -> None:
        """Raises ChaosError if nobody is meant now."""
        if fault.target.kind in ("request", "everything", "deployment"):
            return
        for pid in await self._processes(fault.target):
            os.kill(pid, 0)

    # ------------------------------------------------------------ processes

    async def _signal(self, fault: Fault) -> None:
        held = await self._held_down(fault)
        pids = await self._processes(fault.target)
        for name in held:
            self._own().daemons[name].hold()
        try:
            for pid in pids:
                os.kill(pid, SIGNALS[fault.action])
            await asyncio.sleep(fault.seconds)
        finally:
            for name in held:
                self._own().daemons[name].release()
            if fault.action is Action.STOP and fault.seconds:
                for pid in pids:
                    # Whoever takes it for dead may have ended it.
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

    async def _held_down(self, fault: Fault) -> list[str]:
        """Daemons that are not to be started again meanwhile."""
        return await self._hosts_of(fault.target) if fault.action is Action.KILL and fault.seconds else []

    async def _processes(self, target: Target) -> list[int]:
        if self._hosts is not None and target.kind in ("etcd", "worker", "node", "nodes", "controlplane"):
            # Also those that the cluster takes for dead.
            return [self._hosts.daemons[name].pid for name in await self._hosts_of(target)]
        if target.kind in ("node", "nodes"):
            daemons = [Target.model_validate(f"worker {node}") for node in await self._nodes(target)]
            return [await self._cluster.find(daemon) for daemon in daemons]
        return [await self._cluster.find(target)]

    async def _nodes(self, target: Target) -> list[str]:
        return [target.name] if target.kind == "worker" else await self._cluster.nodes_of(target)

    async def _slow(self, fault: Fault) -> None:
        """It stands still for a part of each short while, as one does whose device is hot or shared."""
        pid = await self._cluster.find(fault.target)
        still_s = SLOW_PERIOD_S * fault.percent / 100
        deadline = asyncio.get_running_loop().time() + fault.seconds
        # Whoever has had enough of it may end it.
        with suppress(ProcessLookupError):
            try:
                while asyncio.get_running_loop().time() < deadline:
                    os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(still_s)
                    os.kill(pid, signal.SIGCONT)
                    await asyncio.sleep(SLOW_PERIOD_S - still_s)
            finally:
                os.kill(pid, signal.SIGCONT)

    # ------------------------------------------------------------ hosts

    def _own(self) -> Hosts:
        assert self._hosts is not None, "the plan was checked"
        return self._hosts

    async def _hosts_of(self, target: Target) -> list[str]:
        """Hosts are called as what runs there."""
        if target.kind == "everything":
            return [*self._own().groups["controlplanes"], *self._own().groups["workers"]]
        if target.kind in ("leader", "standby"):
            return [await self._cluster.name_of(target)]
        if target.kind in ("node", "nodes"):
            return await self._cluster.nodes_of(target)
        return self._own().of(target.name or target.kind)

    async def _jump(self, fault: Fault) -> None:
        hosts = await self._hosts_of(fault.target)
        for host in hosts:
            self._own().set_clock(host, fault.hours * 3600)
        if fault.seconds:
            await asyncio.sleep(fault.seconds)
            for host in hosts:
                self._own().set_clock(host, 0.0)

    async def _freeze(self, fault: Fault) -> None:
        hosts = await self._hosts_of(fault.target)
        if fault.target.kind == "everything":
            hosts += self._own().groups["etcd"]
        frozen: list[int] = []
        try:
            for host in hosts:
                frozen += stop_family(self._own().daemons[host].pid)
            await asyncio.sleep(fault.seconds)
        finally:
            for pid in frozen:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _disturbed(self, fault: Fault, host: str) -> AbstractAsyncContextManager[None]:
        hosts = self._own()
        match fault.action:
            case Action.FILL:
                return hosts.disk_full(host)
            case Action.LAG:
                return hosts.disk_lagging(host, fault.milliseconds)
            case Action.UNPLUG:
                return hosts.network.unplugged(host)
            case Action.DELAY:
                return hosts.network.delayed(host, fault.milliseconds)
            case _:
                return hosts.network.losing(losses_of(fault, host, hosts.of(fault.peers)))

    # ------------------------------------------------------------ planned changes

    async def _reload(self) -> None:
        """Return when every replica has its model from the other folder."""
        before = {replica.id: replica.epoch for replica in (await self._cluster.status()).replicas}
        await self._cluster.apply(self._own().moved_model())
        deadline = asyncio.get_running_loop().time() + RETURN_MAX_S
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(WHEN_POLL_S)
            with suppress(ChaosError):
                rows = (await self._cluster.status()).replicas
                if all(row.phase == READY and row.epoch > before.get(row.id, 0) for row in rows):
                    return
        raise ChaosError(f"not every replica was loaded anew within {RETURN_MAX_S:g} s")

    async def _restart_all(self) -> None:
        """As an operator would: by `perdure ctl`, and etcd's members by hand."""
        rollout = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tools.cli", "ctl", "rollout", "restart"),
            *("--deadline", str(DRAIN_S), "--timeout", str(RETURN_MAX_S)),
            *("--address", ",".join(self._own().addresses)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert rollout.stdout is not None
        line = ""
        async for raw in rollout.stdout:
            line = raw.decode(errors="replace").strip()
            self._say(line)
        if await rollout.wait():
            raise ChaosError(f"perdure ctl rollout restart: {line}")
        for name in self._own().groups["etcd"]:
            await self._restart_member(name)

    async def _restart_member(self, name: str) -> None:
        daemon = self._own().daemons[name]
        before = daemon.pid
        os.kill(before, signal.SIGTERM)
        deadline = asyncio.get_running_loop().time() + RETURN_MAX_S
        while daemon.pid == before or not daemon.running:
            if asyncio.get_running_loop().time() > deadline:
                raise ChaosError(f"{name} did not end within {RETURN_MAX_S:g} s of being asked to")
            await asyncio.sleep(WHEN_POLL_S)
        await self._cluster.wait_whole(RETURN_MAX_S)
        self._say(f"{name} was restarted")


def stop_family(pid: int) -> list[int]:
    """SIGSTOP to a process, then to its children and theirs, so that none is born meanwhile; all that were met."""
    stopped: list[int] = []
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                stopped += stop_family(int(child))
    return stopped


def losses_of(fault: Fault, host: str, peers: list[str]) -> list[Loss]:
    """What is lost between a host and others."""
    losses: list[Loss] = []
    for peer in peers:
        if peer == host:
            continue
        if fault.action is not Action.DEAFEN:
            losses.append(Loss(host, peer, fault.percent))
        if fault.action is not Action.MUTE:
            losses.append(Loss(peer, host, fault.percent))
    return losses
