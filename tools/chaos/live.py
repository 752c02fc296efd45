"""The cluster under test: whom its names stand for, what it says of itself, and what is done to it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc.aio

from protos.perdure.v1 import admin_pb2, admin_pb2_grpc
from tools.chaos.plan import Action, Fault, Target
from tools.up.state import RunningCluster

T = TypeVar("T")

CALL_S = 2.0
POLL_S = 0.2

_SIGNALS = {Action.KILL: signal.SIGKILL, Action.STOP: signal.SIGSTOP, Action.TERMINATE: signal.SIGTERM}


class ChaosError(Exception):
    """The plan cannot be carried out on this cluster; the text is one line for people."""


class LiveCluster:
    """Any control plane answers for all."""

    def __init__(self, addresses: Sequence[str], local: RunningCluster | None) -> None:
        """`local`: what `perdure up` wrote, if it runs this cluster here; only it knows etcd's process."""
        self._addresses = list(addresses)
        self._local = local

    async def status(self) -> admin_pb2.StatusResponse:
        """Raises ChaosError if nobody answers."""
        return await self._ask(lambda stub: stub.Status(admin_pb2.StatusRequest(), timeout=CALL_S))

    async def failures(self) -> list[admin_pb2.FailureStatus]:
        """The leader's records, oldest first."""
        answer = await self._ask(lambda stub: stub.ListFailures(admin_pb2.ListFailuresRequest(), timeout=CALL_S))
        return list(answer.failures)

    async def wait_whole(self, limit_s: float) -> None:
        """Return once there is a leader and every replica of every deployment is ready. Raises ChaosError."""
        deadline = asyncio.get_running_loop().time() + limit_s
        problem = ""
        while asyncio.get_running_loop().time() < deadline:
            try:
                problem = _lacking(await self.status())
            except ChaosError as error:
                problem = str(error)
            if not problem:
                return
            await asyncio.sleep(POLL_S)
        raise ChaosError(f"the cluster was not whole again after {limit_s:g} s: {problem}")

    async def inflict(self, fault: Fault) -> None:
        """Do it, and undo a stop when its time is over. Raises ChaosError."""
        if fault.action is Action.DRAIN:
            drain = admin_pb2.DrainRequest(node=fault.target.name)
            await self._ask(lambda stub: stub.Drain(drain, timeout=CALL_S))
            return
        pid = await self.find(fault.target)
        os.kill(pid, _SIGNALS[fault.action])
        if fault.seconds:
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                os.kill(pid, signal.SIGCONT)

    async def find(self, target: Target) -> int:
        """The process behind a name, now. Raises ChaosError if there is none, or it runs on another host."""
        if target.kind == "etcd":
            pid = self._local.processes.get("etcd") if self._local is not None else None
            if pid is None:
                raise ChaosError("only `perdure up` on this machine tells which process etcd is")
            return pid
        status = await self.status()
        host, pid = _process(status, target)
        if host and host != socket.gethostname():
            raise ChaosError(f"{target} runs on {host}: a fault needs its process on this machine")
        return pid

    async def _ask(self, call: Callable[[admin_pb2_grpc.AdminStub], Awaitable[T]]) -> T:
        problem = "no address"
        for address in self._addresses:
            async with grpc.aio.insecure_channel(address) as channel:
                try:
                    return await call(admin_pb2_grpc.AdminStub(channel))
                except grpc.aio.AioRpcError as error:
                    problem = f"{address}: {error.details()}"
        raise ChaosError(f"no control plane answers ({problem})")


def _lacking(status: admin_pb2.StatusResponse) -> str:
    """What keeps the cluster from being whole; empty if nothing."""
    if not status.HasField("leader"):
        return "there is no leader"
    for deployment in status.deployments:
        if deployment.ready < deployment.replicas:
            return f"{deployment.ready} of {deployment.replicas} replicas of {deployment.id} are ready"
    return ""


def _process(status: admin_pb2.StatusResponse, target: Target) -> tuple[str, int]:
    """(host, pid); the host is empty where the status does not tell it."""
    match target.kind:
        case "leader" if status.HasField("leader"):
            return "", status.leader.pid
        case "controlplane":
            found = [("", gateway.pid) for gateway in status.gateways if gateway.id == target.name]
        case "worker":
            lost = admin_pb2.NODE_PHASE_LOST
            found = [(node.host, node.pid) for node in status.nodes if node.id == target.name and node.phase != lost]
        case "rank":
            found = [
                (node.host, rank.pid)
                for node in status.nodes
                for rank in node.ranks
                if rank.replica == target.name and rank.rank == target.rank
            ]
        case _:
            found = []
    if not found:
        raise ChaosError(f"the cluster has no {target} now")
    return found[0]
