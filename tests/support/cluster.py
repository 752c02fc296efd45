"""A real cluster of real processes on loopback, for tests that kill, stop and restart them.

Every process is started as a user would start it (`perdure controlplane`, `perdure worker`), writes its log below the
cluster's folder, and is ended by pid.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import yaml
from google.protobuf.json_format import MessageToDict

from controlplane.runtime import die_with_parent
from controlplane.runtime.etcd_server import EtcdChild, EtcdTls
from controlplane.runtime.etcd_types import EtcdUnavailable
from protos.perdure.v1 import admin_pb2, admin_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
READY_S = 90.0


def free_port() -> int:
    """A TCP port on loopback that is free and stays so: below the range from which outgoing connections take theirs."""
    while True:
        port = random.randrange(10_240, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


async def eventually(what: str, condition: Callable[[], Any], timeout: float = 30.0) -> Any:
    """Poll `condition` (plain or async) until it is true and return its value; fail naming `what` after `timeout` s."""
    deadline = time.monotonic() + timeout
    last: Any = None
    while time.monotonic() < deadline:
        try:
            last = condition()
            if asyncio.iscoroutine(last):
                last = await last
        except (grpc.aio.AioRpcError, aiohttp.ClientError, OSError, EtcdUnavailable) as error:
            last = None
            problem = str(error)
        else:
            problem = repr(last)
            if last:
                return last
        await asyncio.sleep(0.05)
    raise AssertionError(f"{what} did not come true within {timeout:g} s; last seen: {problem[:2000]}")


@dataclass
class Daemon:
    """One process of the cluster and how to start it again."""

    name: str
    arguments: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        assert not self.running, f"{self.name} runs already"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                die_with_parent.command([sys.executable, "-m", *self.arguments], signal.SIGKILL),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL and reap."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout: float = 10.0) -> int | None:
        """SIGTERM, then SIGKILL after `timeout` seconds; the exit code."""
        if self.process is None:
            return None
        if self.running:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode


class Cluster:
    """etcd, control planes and workers of one test, below one folder. `replicas`: default one a worker. `etcd`: how its
    clients show who they are, as in the cluster's file."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        controlplanes: int = 1,
        workers: int = 2,
        devices_per_worker: int = 1,
        replicas: int | None = None,
        failure_timeout: float = 3.0,
        heartbeat_interval: float = 0.5,
        tls: EtcdTls | None = None,
        etcd: dict[str, str] | None = None,
        **sections: dict[str, Any],
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.etcd = EtcdChild(data_dir=folder / "etcd", log_path=folder / "etcd.log", tls=tls)
        endpoint = f"{'https' if tls else 'http'}://{self.etcd.endpoint}"
        self._etcd: dict[str, Any] = {"endpoints": [endpoint], **(etcd or {})}
        self.controlplanes: dict[str, Daemon] = {}
        self.workers: dict[str, Daemon] = {}
        self._model = model
        self._shape = (controlplanes, workers, devices_per_worker)
        self._replicas = workers if replicas is None else replicas
        self._times = {"failure_timeout": failure_timeout, "heartbeat_interval": heartbeat_interval}
        self._sections = sections

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Start everything, etcd too unless it runs already, and wait until every replica is ready."""
        if not self.etcd.running:
            await self.etcd.start()
        controlplanes, workers, devices = self._shape
        config = self._write_config(workers, devices)
        for index in range(controlplanes):
            self._add_controlplane(f"cp{index}", config)
        for index in range(workers):
            self._add_worker(f"w{index}", devices, config)
        for daemon in self.daemons():
            daemon.start()
        await self.wait_ready()

    def _write_config(self, workers: int, devices: int) -> Path:
        names = [f"cpu:{index}" for index in range(devices)]
        nodes = [
            {"name": f"w{index}", "host": "127.0.0.1", "ports": [free_port()], "devices": names}
            for index in range(workers)
        ]
        model = {
            "path": str(self._model),
            "name": "tiny",
            "dtype": "float32",
            "cpu_threads": 1,
            "kv_cache_tokens": 32768,
        }
        sections = {key: dict(value) for key, value in self._sections.items()}
        document: dict[str, Any] = {
            "cluster": {"name": "test", "nodes": nodes, "etcd": self._etcd},
            "model": {**model, **sections.pop("model", {})},
            "fault_tolerance": {**self._times, **sections.pop("fault_tolerance", {})},
            **sections,
        }
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def _add_controlplane(self, name: str, config: Path) -> None:
        ports = {"grpc": free_port(), "http": free_port()}
        self.controlplanes[name] = Daemon(
            name,
            [
                "controlplane",
                *("--config", str(config)),
                *("--name", name),
                *("--port", str(ports["grpc"])),
                *("--http-port", str(ports["http"])),
                *("--state-dir", str(self.folder / "state")),
                *("--log-format", "json"),
            ],
            self.folder / f"{name}.log",
            ports=ports,
        )

    def _add_worker(self, name: str, devices: int, config: Path) -> None:
        ports = {"grpc": free_port()}
        self.workers[name] = Daemon(
            name,
            [
                "dataplane",
                *("--config", str(config)),
                *("--node", name),
                *("--port", str(ports["grpc"])),
                *("--devices", ",".join(f"cpu:{index}" for index in range(devices))),
                *("--state-dir", str(self.folder / "state")),
                *("--log-format", "json"),
            ],
            self.folder / f"{name}.log",
            ports=ports,
        )

    def daemons(self) -> list[Daemon]:
        return [*self.controlplanes.values(), *self.workers.values()]

    async def stop(self) -> None:
        """End everything, workers first, etcd last."""
        for daemon in [*self.workers.values(), *self.controlplanes.values()]:
            if daemon.running:
                daemon.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
                daemon.process.kill()  # type: ignore[union-attr]
        for daemon in self.daemons():
            daemon.kill()
        await self.etcd.stop()

    # ------------------------------------------------------------ what it says of itself

    def address(self, name: str | None = None) -> str:
        """host:port of a control plane's gRPC server; without a name, of the first that runs."""
        daemon = self.controlplanes[name] if name else next(d for d in self.controlplanes.values() if d.running)
        return f"127.0.0.1:{daemon.ports['grpc']}"

    def url(self, name: str | None = None) -> str:
        """Base URL of a gateway; without a name, of the first whose process runs."""
        daemon = self.controlplanes[name] if name else next(d for d in self.controlplanes.values() if d.running)
        return f"http://127.0.0.1:{daemon.ports['http']}"

    async def status(self, name: str | None = None) -> dict[str, Any]:
        """Admin.Status as a dictionary with the proto's field names; every field is there."""
        async with grpc.aio.insecure_channel(self.address(name)) as channel:
            response = await admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=5)
        return MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

    async def events(self, name: str | None = None, *, own: bool = False) -> list[dict[str, Any]]:
        """All events kept by the leader; `own`: by the control plane that is asked."""
        async with grpc.aio.insecure_channel(self.address(name)) as channel:
            stream = admin_pb2_grpc.AdminStub(channel).Events(admin_pb2.EventsRequest(own=own), timeout=5)
            return [MessageToDict(event, preserving_proto_field_name=True) async for event in stream]

    async def failures(self, name: str | None = None) -> list[dict[str, Any]]:
        """The leader's failures, oldest first."""
        async with grpc.aio.insecure_channel(self.address(name)) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)
            response = await stub.ListFailures(admin_pb2.ListFailuresRequest(), timeout=5)
        document = MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        return document["failures"]

    async def readiness(self, name: str | None = None) -> tuple[int, str]:
        """/ready of a gateway: its status, and what it says."""
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
            session.get(f"{self.url(name)}/ready") as reply,
        ):
            return reply.status, (await reply.json())["reason"]

    async def ready_replicas(self) -> dict[str, dict[str, Any]]:
        status = await self.status()
        return {row["id"]: row for row in status["replicas"] if row["phase"] == "REPLICA_PHASE_READY"}

    async def wait_ready(self, replicas: int | None = None) -> dict[str, Any]:
        """Wait until so many replicas (default: all of the cluster's) are ready and every control plane that runs
        serves; the status then."""
        wanted = replicas if replicas is not None else self._replicas

        async def ready() -> dict[str, Any] | None:
            for daemon in self.daemons():
                if daemon.process is not None and not daemon.running:
                    raise AssertionError(f"{daemon.name} exited with {daemon.process.returncode}:\n{tail(daemon.log)}")
            status = await self.status()
            rows = [row for row in status["replicas"] if row["phase"] == "REPLICA_PHASE_READY"]
            return status if len(rows) >= wanted and await self._all_serve() else None

        return await eventually(f"{wanted} replicas ready", ready, READY_S)

    async def _all_serve(self) -> bool:
        running = [name for name, daemon in self.controlplanes.items() if daemon.running]
        return all([(await self.readiness(name))[0] == 200 for name in running])

    async def leader(self) -> Daemon:
        """The control plane that leads."""
        status = await self.status()
        return self.controlplanes[status["leader"]["id"]]

    async def ranks(self) -> list[dict[str, Any]]:
        """Every rank that serves: node, rank, pid, device, replica, epoch."""
        status = await self.status()
        return [{**rank, "node": node["id"]} for node in status["nodes"] for rank in node["ranks"] if rank["replica"]]


def tail(log: Path, lines: int = 40) -> str:
    """The end of a log, for a failing test's message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def logged(log: Path, event: str) -> list[dict[str, Any]]:
    """All events of one name in a JSON-lines log."""
    found: list[dict[str, Any]] = []
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{") and f'"{event}"' in line:
            record = json.loads(line)
            if record.get("event") == event:
                found.append(record)
    return found
