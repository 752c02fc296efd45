"""A cluster of its own to break: etcd's members, control planes and workers, each on a host of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from controlplane.config import ClusterConfig
from controlplane.runtime.etcd_server import EtcdChild, find_etcd, find_etcdctl
from controlplane.runtime.records import DeploymentRecord
from tools.chaos import disk
from tools.chaos.daemon import Daemon
from tools.chaos.network import CLIENTS, Network, run
from tools.chaos.plan import HostsShape
from tools.up.plan import controlplane_spec, worker_spec
from tools.up.process import ChildSpec
from tools.up.state import StateDir

GRPC_PORT, HTTP_PORT, WORKER_PORT = 7700, 8000, 7800
ETCD_CLIENT_PORT, ETCD_PEER_PORT = 2379, 2380
KV_CACHE_TOKENS = 32_768

DISK_MB, ETCD_DISK_MB = 32, 512
"""etcd sets 64 MB aside for each segment of its log."""

PASSWORD = "chaos"

FAKETIME = "faketime/libfaketimeMT.so.1"


class HostsError(Exception):
    """The cluster cannot be run; the text is one line for people."""


class Hosts:
    """The hosts by name, what runs there, and what may be done to a host as such. Owned by one run of a plan."""

    def __init__(self, shape: HostsShape, model: Path, folder: Path, logs: Path, *, clock: bool) -> None:
        """`folder` for everything but the logs. `clock`: wall clocks are to be set, which takes libfaketime."""
        self.network = Network()
        self.daemons: dict[str, Daemon] = {}
        self.groups = {
            "etcd": [f"etcd-{index}" for index in range(shape.etcd)],
            "controlplanes": [f"cp-{index}" for index in range(shape.controlplanes)],
            "workers": [f"worker-{index}" for index in range(shape.workers)],
            "clients": [CLIENTS],
        }
        self._shape = shape
        self._model = model
        self._folder = folder
        self._logs = logs
        self._faketime = _find_faketime() if clock else None
        self._addresses: dict[str, str] = {}
        # How often the model was given another folder.
        self._moves = 0
        self._members: dict[str, EtcdChild] = {}
        self._keeping: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Raises NetworkError, or PerdureError if there is no etcd."""
        self._logs.mkdir(parents=True, exist_ok=True)
        await self.network.start()
        for name in (name for group, names in self.groups.items() if group != "clients" for name in names):
            address = await self.network.add(name)
            await self._make_disk(name)
            self._addresses[name] = address
        self._plan_etcd()
        self._plan_daemons(self._config())
        for daemon in self.daemons.values():
            await daemon.start()
            self._keeping.append(asyncio.create_task(daemon.keep()))

    async def stop(self) -> None:
        """SIGKILL to all; ranks end with their daemons."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(daemon.kill() for daemon in self.daemons.values()))
        for name in self._addresses:
            # Lazily: a dying rank may hold it for a moment.
            await run("umount", "--lazy", str(self._disk(name)))
        await self.network.stop()

    @property
    def addresses(self) -> list[str]:
        """host:port of the control planes' gRPC servers."""
        return [f"{self._addresses[name]}:{GRPC_PORT}" for name in self.groups["controlplanes"]]

    @property
    def urls(self) -> list[str]:
        """Of the gateways."""
        return [f"http://{self._addresses[name]}:{HTTP_PORT}" for name in self.groups["controlplanes"]]

    def of(self, name: str) -> list[str]:
        """The hosts of a group, of everybody, or one host by its name. Raises HostsError."""
        if name == "everybody":
            return self.network.hosts
        found = self.groups.get(name, [name] if name in self.network.hosts else None)
        if found is None:
            raise HostsError(f"there is no host {name!r}: {', '.join(self.network.hosts)}, {', '.join(self.groups)}")
        return found

    # ------------------------------------------------------------ what is done to a host

    @asynccontextmanager
    async def disk_full(self, host: str) -> AsyncIterator[None]:
        """Meanwhile there is no room on the disk that holds its state."""
        filler = self._disk(host) / "filler"
        try:
            # The clients' streams are in this process.
            await asyncio.to_thread(disk.fill, filler)
            yield
        finally:
            filler.unlink(missing_ok=True)

    def disk_lagging(self, host: str, milliseconds: int) -> AbstractAsyncContextManager[None]:
        """Meanwhile what runs there waits so much longer for each write to be safe. Raises DiskError."""
        return disk.lagging(self.daemons[host].pid, milliseconds)

    def set_clock(self, host: str, ahead_s: float) -> None:
        """Its wall clock goes so far ahead of this machine's; what counts monotonic time notices nothing."""
        file = self._clock(host)
        partial = file.with_suffix(".partial")
        partial.write_text(f"{ahead_s:+f}\n")
        partial.replace(file)

    # ------------------------------------------------------------ what is desired

    def moved_model(self) -> DeploymentRecord:
        """The deployment with the same model in another folder, which is another model to the cluster."""
        self._moves += 1
        folder = self._folder / f"move-{self._moves}"
        folder.mkdir()
        # Clients go on to ask for it by the last part of its path.
        path = folder / self._model.name
        path.symlink_to(self._model)
        config = self._config()
        return config.with_model(path, config.model_name).deployment()

    # ------------------------------------------------------------ etcd as a whole

    async def save_etcd(self) -> None:
        """A snapshot, which the next one replaces. Raises HostsError."""
        await self._etcdctl("snapshot", "save", str(self._snapshot))

    async def restore_etcd(self) -> None:
        """End all members and start them from the snapshot, as after the loss of them all. Raises HostsError."""
        members = [self.daemons[name] for name in self._members]
        for member in members:
            member.hold()
        try:
            await asyncio.gather(*(member.kill() for member in members))
            cluster = ",".join(f"{name}={member.peer_url}" for name, member in self._members.items())
            for name, member in self._members.items():
                shutil.rmtree(member.data_dir)
                await self._etcdctl(
                    *("snapshot", "restore", str(self._snapshot)),
                    *("--name", name, "--data-dir", str(member.data_dir)),
                    *("--initial-cluster", cluster, "--initial-advertise-peer-urls", member.peer_url),
                )
        finally:
            for member in members:
                member.release()

    async def compact_etcd(self) -> None:
        """Have it forget everything but the present. Raises HostsError."""
        answer = json.loads(await self._etcdctl("put", "chaos", "compacted", "--write-out=json"))
        await self._etcdctl("compaction", str(answer["header"]["revision"]))

    @asynccontextmanager
    async def etcd_denying(self) -> AsyncIterator[None]:
        """Meanwhile it serves nobody who does not know a password, which the daemons do not. Raises HostsError."""
        root = f"--user=root:{PASSWORD}"
        await self._etcdctl("user", "add", "root", f"--new-user-password={PASSWORD}")
        await self._etcdctl("user", "grant-role", "root", "root")
        await self._etcdctl("auth", "enable")
        try:
            yield
        finally:
            await self._etcdctl(root, "auth", "disable")
            await self._etcdctl("user", "delete", "root")

    @property
    def _snapshot(self) -> Path:
        return self._folder / "etcd.snapshot"

    async def _etcdctl(self, *arguments: str) -> str:
        """What it prints. One that takes a snapshot asks one member."""
        members = list(self._members.values())[: 1 if arguments[0] == "snapshot" else None]
        endpoints = ",".join(member.endpoint for member in members)
        process = await asyncio.create_subprocess_exec(
            *(str(find_etcdctl()), f"--endpoints={endpoints}", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode:
            raise HostsError(f"etcdctl {' '.join(arguments[:2])}: {output.decode(errors='replace').strip()}")
        return output.decode()

    # ------------------------------------------------------------ what runs where

    def _config(self) -> ClusterConfig:
        # All hosts share this machine's cores and memory.
        model = {"path": str(self._model), "cpu_threads": 1, "kv_cache_tokens": KV_CACHE_TOKENS}
        settings = self._shape.settings
        devices = [f"cpu:{index}" for index in range(self._shape.devices)]
        return ClusterConfig.model_validate(
            {
                **settings,
                "model": {**model, **settings.get("model", {})},
                "cluster": {
                    "name": "chaos",
                    "nodes": [
                        {"name": name, "host": self._addresses[name], "ports": [WORKER_PORT], "devices": devices}
                        for name in self.groups["workers"]
                    ],
                    "controlplanes": [
                        {"name": name, "host": self._addresses[name], "port": GRPC_PORT, "http_port": HTTP_PORT}
                        for name in self.groups["controlplanes"]
                    ],
                    "etcd": {
                        "endpoints": [f"{self._addresses[name]}:{ETCD_CLIENT_PORT}" for name in self.groups["etcd"]]
                    },
                },
            }
        )

    def _plan_etcd(self) -> None:
        binary = find_etcd()
        urls = {name: f"http://{self._addresses[name]}:{ETCD_PEER_PORT}" for name in self.groups["etcd"]}
        for name in urls:
            member = self._members[name] = EtcdChild(
                data_dir=self._disk(name) / "data",
                log_path=self._log(name),
                host=self._addresses[name],
                client_port=ETCD_CLIENT_PORT,
                peer_port=ETCD_PEER_PORT,
                name=name,
                members=urls,
            )
            self._add(name, member.command(binary))

    def _plan_daemons(self, config: ClusterConfig) -> None:
        text = config.to_yaml()
        for process in config.cluster.controlplanes:
            state = StateDir(self._disk(str(process.name)))
            state.config.write_text(text)
            self._add_spec(controlplane_spec(process, state))
        for node in config.node_names():
            state = StateDir(self._disk(node))
            state.config.write_text(text)
            self._add_spec(worker_spec(node, ["--config", str(state.config)], state))

    def _add_spec(self, spec: ChildSpec) -> None:
        environment = {**spec.environment, "PERDURE_RUNTIME_DIR": str(self._folder / "run" / spec.name)}
        if self._faketime is not None:
            self.set_clock(spec.name, 0.0)
            environment |= {
                "LD_PRELOAD": str(self._faketime),
                "FAKETIME_TIMESTAMP_FILE": str(self._clock(spec.name)),
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                # Seconds between two looks at the file.
                "FAKETIME_CACHE_DURATION": "1",
            }
        self._add(spec.name, spec.argv, environment)

    def _add(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        inside = self.network.inside(name)
        inside[0] = shutil.which(inside[0]) or inside[0]
        self.daemons[name] = Daemon(name, [*inside, *command], self._log(name), environment or {})

    async def _make_disk(self, name: str) -> None:
        """Its state lies on a small disk of its own, which can be full."""
        disk = self._disk(name)
        disk.mkdir(parents=True)
        size = ETCD_DISK_MB if name in self.groups["etcd"] else DISK_MB
        await run("mount", "-t", "tmpfs", "-o", f"size={size}m", "none", str(disk))

    def _disk(self, host: str) -> Path:
        return self._folder / "disks" / host

    def _clock(self, host: str) -> Path:
        # Not on its disk, which may be full.
        return self._folder / f"{host}.clock"

    def _log(self, host: str) -> Path:
        return self._logs / f"{host}.log"


def _find_faketime() -> Path:
    folders = [Path("/usr/lib"), *Path("/usr/lib").glob("*-linux-gnu*"), Path("/usr/lib64")]
    found = next((folder / FAKETIME for folder in folders if (folder / FAKETIME).is_file()), None)
    if found is None:
        raise HostsError("to set a host's clock takes libfaketime (package libfaketime), which is not installed")
    return found
