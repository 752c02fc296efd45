"""A real etcd for tests: fixtures, and what may be done to it (stop, restore, several members, users, TLS)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trustme

from controlplane.runtime.clock import SystemClock
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_server import EtcdChild, find_etcdctl, free_port
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.ids import draw_id
from controlplane.runtime.keys import Keys
from controlplane.runtime.timing import derive_timings
from tests.support.cluster import eventually

TIMINGS = derive_timings(failure_timeout=2.0, heartbeat_interval=0.25)
"""Short, so that leases expire while a test waits."""

CLOCK = SystemClock()

QUICK = ("--heartbeat-interval=50", "--election-timeout=500")
"""Elections of etcd's own take half a second, so that it is soon back after a kill."""


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdChild]:
    """One member, shared by a module; a test takes keys of its own (`keys`) and leaves it running."""
    folder = tmp_path_factory.mktemp("etcd")
    child = EtcdChild(data_dir=folder / "data", log_path=folder / "etcd.log", timings=TIMINGS, arguments=QUICK)
    asyncio.run(child.start())
    yield child
    asyncio.run(child.stop())


@pytest.fixture(scope="module")
def etcd_members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EtcdChild]]:
    """A cluster of three, shared by a module; a test leaves all three running."""
    folder = tmp_path_factory.mktemp("etcd-members")
    ports = {f"m{index}": free_port("127.0.0.1") for index in range(3)}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    children = [
        EtcdChild(
            data_dir=folder / name,
            log_path=folder / f"{name}.log",
            timings=TIMINGS,
            name=name,
            peer_port=port,
            members=urls,
            arguments=QUICK,
        )
        for name, port in ports.items()
    ]

    async def start() -> None:
        for child in children:
            child.launch()
        for child in children:
            await child.until_serving()

    async def stop() -> None:
        for child in children:
            await child.stop()

    asyncio.run(start())
    yield children
    asyncio.run(stop())


@pytest.fixture
async def own_etcd(tmp_path: Path) -> AsyncIterator[EtcdChild]:
    """One member of the test's own, to be killed and restored."""
    child = EtcdChild(data_dir=tmp_path / "data", log_path=tmp_path / "etcd.log", timings=TIMINGS, arguments=QUICK)
    await child.start()
    yield child
    await child.stop()


@pytest.fixture
def keys() -> Keys:
    """Keys that no other test uses."""
    return Keys(f"test-{draw_id()[:8]}")


@pytest.fixture
async def client(etcd: EtcdChild) -> AsyncIterator[EtcdClient]:
    async with client_of(etcd.endpoint) as client:
        yield client


@asynccontextmanager
async def client_of(*endpoints: str) -> AsyncIterator[EtcdClient]:
    """A client without TLS or user."""
    client = EtcdClient(EtcdOptions(endpoints=endpoints), TIMINGS, CLOCK)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def running(*loops: object) -> AsyncIterator[None]:
    """Run the eternal coroutines beside the test's body and end them after it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop) for loop in loops]  # type: ignore[arg-type]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


@contextmanager
def stopped(child: EtcdChild) -> Iterator[None]:
    """SIGSTOP: it keeps its connections and answers nothing."""
    os.kill(child.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(child.pid, signal.SIGCONT)


def etcdctl(child: EtcdChild, *arguments: str, given: str = "") -> str:
    """What it prints when it is given so much on its standard input."""
    command = [str(find_etcdctl()), f"--endpoints={child.endpoint}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20, input=given).stdout


def pem_files(issued: trustme.LeafCert, path: Path) -> tuple[Path, Path]:
    """Certificate and key in files beside each other."""
    cert, key = path.with_suffix(".crt"), path.with_suffix(".key")
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    return cert, key


async def reached(client: EtcdClient) -> None:
    """Wait until it has found its way back to an etcd that was away: until then a call is refused at once."""

    async def answers() -> bool:
        await client.get("x", timeout=2.0)
        return True

    await eventually("etcd is reached", answers)


def save_snapshot(child: EtcdChild, path: Path) -> None:
    etcdctl(child, "snapshot", "save", str(path))


async def restore_snapshot(child: EtcdChild, path: Path) -> None:
    """Stop a single member and start it from the snapshot, at the same addresses."""
    await child.kill()
    shutil.rmtree(child.data_dir)
    etcdctl(
        child,
        *("snapshot", "restore", str(path)),
        f"--data-dir={child.data_dir}",
        f"--name={child.name}",
        f"--initial-cluster={child.name}={child.peer_url}",
        f"--initial-advertise-peer-urls={child.peer_url}",
    )
    await child.start()
