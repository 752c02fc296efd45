"""A worker daemon as a real process, and both its peers played from a test over real gRPC and a real etcd.

`python -m tests.support.worker ETCD CLUSTER NODE PORT DEVICES FOLDER ENTRY` runs the daemon, mostly with ranks of
tests.support.rank_process, which start without torch.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from controlplane.runtime.clock import SystemClock
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_server import EtcdChild
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.ids import (
    NodeId,
    draw_id,
)
from controlplane.runtime.keys import Keys
from controlplane.runtime.records import ClusterRecord, NodeRecord, from_json, to_json
from controlplane.runtime.telemetry import configure_logging
from dataplane.__main__ import run_worker
from dataplane.config import WorkerFlags, resolve
from dataplane.rank_pool import PoolSettings
from tests.support.cluster import ROOT, free_port
from tests.support.worker_peers import CLUSTER, TIMINGS, PlayedGateway, PlayedLeader

RANK_ENTRY = "tests.support.rank_process:rank_main"


# ---------------------------------------------------------------- the daemon


class WorkerProcess:
    """One daemon, started as its own process."""

    def __init__(self, stage: Stage, node: str, devices: str, port: int | None, entry: str) -> None:
        folder = stage.folder
        self.node = NodeId(node)
        self.port = port or free_port()
        self.folder = folder
        self.log = folder / f"{node}.log"
        cluster = stage.keys.cluster_name
        self._arguments = (stage.etcd.endpoint, cluster, node, str(self.port), devices, str(folder), entry)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PERDURE_RUNTIME_DIR": str(self.folder / "run")}
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.support.worker", *self._arguments),
                stdout=log,
                stderr=log,
                env=environment,
            )

    async def wait(self, timeout: float = 30.0) -> int:
        """Its exit code, once it has ended."""
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), timeout)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def end(self) -> None:
        """Whatever it is doing: gone afterwards."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            await self._process.wait()

    def descendants(self) -> list[int]:
        """Its zygote and that one's ranks."""
        children: dict[int, list[int]] = defaultdict(list)
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children[int(fields[1])].append(int(status.parent.name))
        found, frontier = [], [self.pid]
        while frontier:
            frontier = [child for parent in frontier for child in children[parent]]
            found += frontier
        return found

    def log_text(self) -> str:
        return self.log.read_text()


def main(etcd: str, cluster: str, node: str, port: str, devices: str, folder: str, entry: str) -> int:
    flags = WorkerFlags(
        etcd=etcd, node=node, cluster=cluster, port=int(port), devices=devices, state_dir=Path(folder) / "state"
    )
    config = resolve(flags)
    configure_logging(json_lines=True, node=node)
    settings = PoolSettings(node=config.node, log_dir=config.log_dir, entry=entry)
    return run_worker(config, replace(settings, preload=()) if entry == RANK_ENTRY else settings)


# ---------------------------------------------------------------- the stage


class Stage:
    """A cluster of its own in an etcd: its record, a leader, and daemons."""

    def __init__(self, etcd: EtcdChild, folder: Path) -> None:
        self.etcd = etcd
        self.folder = folder
        self.keys = Keys(draw_id())
        self.leader = PlayedLeader()
        self.workers: list[WorkerProcess] = []
        self.gateways: list[PlayedGateway] = []
        self._client: EtcdClient | None = None

    @property
    def client(self) -> EtcdClient:
        assert self._client is not None
        return self._client

    async def put_cluster(self) -> None:
        record = ClusterRecord(cluster=CLUSTER, timing=TIMINGS.to_spec())
        await self.client.put(self.keys.cluster, to_json(record), timeout=5)

    async def put_leader(self, leader: PlayedLeader) -> None:
        await self.client.put(self.keys.leader, to_json(leader.record), timeout=5)

    async def node_record(self, node: NodeId) -> NodeRecord | None:
        item = await self.client.get(self.keys.node(node), timeout=5)
        return from_json(item.value, NodeRecord) if item is not None else None

    async def worker(
        self, node: str = "w0", devices: str = "cpu:0", port: int | None = None, entry: str = RANK_ENTRY
    ) -> WorkerProcess:
        """Start a daemon, whose ranks run `entry`."""
        worker = WorkerProcess(self, node, devices, port, entry)
        self.workers.append(worker)
        await worker.start()
        return worker

    async def gateway(self, worker: WorkerProcess, incarnation: str | None = None) -> PlayedGateway:
        """Connect a gateway."""
        gateway = PlayedGateway(worker.address, incarnation=incarnation)
        self.gateways.append(gateway)
        await gateway.connect()
        return gateway

    async def connect(self) -> None:
        """Reach etcd, and start the leader; nobody is told of it yet."""
        self._client = EtcdClient(EtcdOptions(endpoints=(self.etcd.endpoint,)), TIMINGS, SystemClock())
        await self.leader.start()

    async def open(self) -> None:
        """Make the cluster one that a worker can join."""
        await self.put_cluster()
        await self.put_leader(self.leader)

    async def close(self) -> None:
        for gateway in self.gateways:
            await gateway.disconnect()
        for worker in self.workers:
            await worker.end()
        await self.leader.stop()
        if self._client is not None:
            await self._client.close()


@asynccontextmanager
async def stage(etcd: EtcdChild, folder: Path) -> AsyncIterator[Stage]:
    """A stage, cleared afterwards."""
    played = Stage(etcd, folder)
    try:
        await played.connect()
        await played.open()
        yield played
    finally:
        await played.close()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
