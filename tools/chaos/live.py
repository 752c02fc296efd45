"""The cluster under test: whom its names stand for, what it says of itself, and what is done to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import grpc.aio

from controlplane.runtime.codec import Codec
from controlplane.runtime.records import DeploymentRecord
from protos.perdure.v1 import admin_pb2, admin_pb2_grpc
from tools.chaos.fault import Target
from tools.ctl.views import enum_word
from tools.up.state import RunningCluster

T = TypeVar("T")

_SPEC = Codec(DeploymentRecord, admin_pb2.DeploymentSpec)

CALL_S = 2.0
POLL_S = 0.2

EVENTS_MAX = 1000


class ChaosError(Exception):
    """The plan cannot be carried out on this cluster; the text is one line for people."""


class LiveCluster:
    """Any control plane answers for all; the one that answered last is asked first."""

    def __init__(self, addresses: Sequence[str], local: RunningCluster | None = None, *, nodes: int = 0) -> None:
        """`local`: what `perdure up` wrote, if it runs this cluster here; only it knows etcd's process. `nodes`: how
        many a whole cluster has, with a gateway at each address; 0: whoever is there."""
        self._addresses = list(addresses)
        self._local = local
        self._nodes = nodes
        self._gateways = len(self._addresses) if nodes else 0

    async def status(self) -> admin_pb2.StatusResponse:
        """The leader's, if one of those who answer can reach it. Raises ChaosError if nobody answers."""
        request = admin_pb2.StatusRequest()
        return await self._ask(
            lambda stub: stub.Status(request, timeout=CALL_S), lambda answer: answer.HasField("leader")
        )

    async def failures(self) -> list[admin_pb2.FailureStatus]:
        """The leader's records, oldest first."""
        answer = await self._ask(lambda stub: stub.ListFailures(admin_pb2.ListFailuresRequest(), timeout=CALL_S))
        return list(answer.failures)

    async def events(self) -> list[admin_pb2.EventsResponse]:
        """What all control planes that answer have in their logs: one that led and was deposed has last words."""
        logs = await asyncio.gather(*(self._events_of(address) for address in self._addresses))
        return [event for log in logs for event in log]

    async def _events_of(self, address: str) -> list[admin_pb2.EventsResponse]:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)
            stream = stub.Events(admin_pb2.EventsRequest(last=EVENTS_MAX, own=True), timeout=CALL_S)
            try:
                return [event async for event in stream]
            except grpc.aio.AioRpcError:
                return []

    async def requests(self) -> list[admin_pb2.RequestStatus]:
        """Those that the leader knows."""
        request = admin_pb2.ListRequestsRequest()
        answer = await self._ask(lambda stub: stub.ListRequests(request, timeout=CALL_S))
        return list(answer.requests)

    async def scale(self, deployment: str, replicas: int) -> None:
        scale = admin_pb2.ScaleRequest(deployment=deployment, replicas=replicas)
        await self._ask(lambda stub: stub.Scale(scale, timeout=CALL_S))

    async def apply(self, record: DeploymentRecord) -> None:
        apply = admin_pb2.ApplyRequest(deployment=_SPEC.to_proto(record))
        await self._ask(lambda stub: stub.Apply(apply, timeout=CALL_S))

    async def drain(self, node: str) -> None:
        drain = admin_pb2.DrainRequest(node=node)
        await self._ask(lambda stub: stub.Drain(drain, timeout=CALL_S))

    async def undrain(self, node: str) -> None:
        undrain = admin_pb2.UndrainRequest(node=node)
        await self._ask(lambda stub: stub.Undrain(undrain, timeout=CALL_S))

    async def drained(self) -> list[str]:
        """Nodes that get no work because somebody said so."""
        away = (admin_pb2.NODE_PHASE_DRAINING, admin_pb2.NODE_PHASE_LEFT)
        return [node.id for node in (await self.status()).nodes if node.phase in away]

    async def working_address(self) -> str:
        """Of a control plane that answers. Raises ChaosError."""
        await self.status()
        return self._addresses[0]

    async def name_of(self, target: Target) -> str:
        """The name of the control plane that leads, or of one that does not. Raises ChaosError."""
        status = await self.status()
        leader = status.leader.id
        if target.kind == "leader" and leader:
            return leader
        others = sorted(gateway.id for gateway in status.gateways if gateway.id != leader)
        if target.kind != "standby" or not others:
            raise ChaosError(f"the cluster has no {target} now")
        return others[0]

    async def nodes_of(self, target: Target) -> list[str]:
        """The nodes on which a rank, or a whole replica, runs now. Raises ChaosError."""
        members = [
            member
            for replica in (await self.status()).replicas
            if replica.id == target.name
            for member in replica.members
            if target.kind == "nodes" or member.rank == target.rank
        ]
        if not members:
            raise ChaosError(f"the cluster has no {target} now")
        return sorted({member.node for member in members})

    async def wait_whole(self, limit_s: float) -> None:
        """Return once there is a leader, everybody is there, and of every deployment all replicas, in full size, and
        all spares are ready. Raises ChaosError."""
        deadline = asyncio.get_running_loop().time() + limit_s
        problem = ""
        while asyncio.get_running_loop().time() < deadline:
            try:
                problem = self._lacking(await self.status())
            except ChaosError as error:
                problem = str(error)
            if not problem:
                return
            await asyncio.sleep(POLL_S)
        raise ChaosError(f"the cluster was not whole again after {limit_s:g} s: {problem}")

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

    def _lacking(self, status: admin_pb2.StatusResponse) -> str:
        """What keeps the cluster from being whole; empty if nothing."""
        if not status.HasField("leader"):
            return "there is no leader"
        if status.leader.phase != admin_pb2.LEADER_PHASE_LEADING:
            return f"the leader is {enum_word(status.leader, 'phase')}"
        live = [node for node in status.nodes if node.phase == admin_pb2.NODE_PHASE_LIVE]
        if len(live) < self._nodes:
            return f"{len(live)} of {self._nodes} nodes are live"
        if len(status.gateways) < self._gateways:
            return f"{len(status.gateways)} of {self._gateways} gateways are known"
        if not status.deployments:
            return "there is no deployment"
        for deployment in status.deployments:
            if deployment.ready < deployment.replicas:
                return f"{deployment.ready} of {deployment.replicas} replicas of {deployment.id} are ready"
            if deployment.spares_ready < deployment.spares:
                return f"{deployment.spares_ready} of {deployment.spares} spares of {deployment.id} are ready"
            for replica in status.replicas:
                if replica.deployment == deployment.id and _degrees(replica) != _degrees(deployment):
                    return f"{replica.id} is shrunk"
        return ""

    async def _ask(
        self, call: Callable[[admin_pb2_grpc.AdminStub], Awaitable[T]], good: Callable[[T], bool] = lambda _: True
    ) -> T:
        """The first good answer, else the last one. Raises ChaosError if there is none."""
        problem = "no address"
        answers: list[T] = []
        for address in list(self._addresses):
            async with grpc.aio.insecure_channel(address) as channel:
                try:
                    answer = await call(admin_pb2_grpc.AdminStub(channel))
                except grpc.aio.AioRpcError as error:
                    problem = f"{address}: {error.details()}"
                    continue
            answers.append(answer)
            if good(answer):
                self._addresses.sort(key=lambda other: other != address)
                return answer
        if answers:
            return answers[-1]
        raise ChaosError(f"no control plane answers ({problem})")


def _degrees(row: admin_pb2.ReplicaStatus | admin_pb2.DeploymentStatus) -> tuple[int, int]:
    return row.degrees.tensor, row.degrees.pipeline


def _process(status: admin_pb2.StatusResponse, target: Target) -> tuple[str, int]:
    """(host, pid); the host is empty where the status does not tell it."""
    match target.kind:
        case "leader" if status.HasField("leader"):
            return "", status.leader.pid
        case "controlplane":
            found = [("", gateway.pid) for gateway in status.gateways if gateway.id == target.name]
        case "standby":
            leader = status.leader.id
            found = [("", gateway.pid) for gateway in status.gateways if gateway.id != leader]
        case "zygote":
            daemon = Target.model_validate(f"worker {target.name}")
            host, pid = _process(status, daemon)
            found = [(host, zygote_of(pid))]
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


def zygote_of(daemon: int) -> int:
    """The child of a worker daemon from which its ranks are forked. Raises ChaosError."""
    children = Path(f"/proc/{daemon}/task/{daemon}/children")
    for pid in children.read_text().split() if children.exists() else []:
        if b"dataplane.zygote" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    raise ChaosError(f"the worker daemon {daemon} has no zygote now")
