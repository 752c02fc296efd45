"""The state folder of a local cluster: etcd's data, logs, and the record of the cluster that runs there now."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from controlplane.config import ClusterConfig


class StateError(RuntimeError):
    """The state folder cannot be used; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """What `perdure ctl` and scripts need to know of a running cluster."""

    cluster: str
    # Of `perdure up` itself.
    pid: int
    # Base URLs of the gateways.
    urls: list[str]
    # host:port of the control planes' gRPC servers.
    addresses: list[str]
    etcd: list[str]
    model: str
    # Name of each daemon and its pid.
    processes: dict[str, int] = field(default_factory=dict)


def default_state_dir(cluster: str) -> Path:
    """$XDG_STATE_HOME/perdure/<cluster>, or ~/.perdure/<cluster>."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) / "perdure" if base else Path.home() / ".perdure") / cluster


def local_state_dir() -> Path:
    """That of a cluster which nobody named: where `perdure ctl` looks."""
    return default_state_dir(ClusterConfig.from_flags().cluster.name)


def check_writable(path: Path) -> None:
    """Raises StateError where no file can be put at `path`."""
    if not path.parent.is_dir():
        raise StateError(f"{path} cannot be written: {path.parent} is no folder")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise StateError(f"{path} cannot be written: {'it is a folder' if path.is_dir() else 'permission denied'}")


class StateDir:
    """Paths below one state folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.etcd = path / "etcd"
        self.logs = path / "logs"
        self.config = path / "cluster.yaml"
        self._lock = path / "lock"
        self._running = path / "running.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. Raises StateError naming the cluster that holds it already.

        The kernel drops the lock with its holder, so that a killed `perdure up` blocks no later one.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StateError(f"state folder {self.path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StateError(self._holder()) from error
        try:
            self._running.unlink(missing_ok=True)
            yield
        finally:
            self._running.unlink(missing_ok=True)
            os.close(descriptor)

    def write_running(self, running: RunningCluster) -> None:
        write_json(self._running, running)

    def running(self) -> RunningCluster | None:
        """The cluster that runs on this folder now, or None."""
        with suppress(OSError, ValueError, TypeError):
            running = RunningCluster(**json.loads(self._running.read_text()))
            if _alive(running.pid):
                return running
        return None

    def _holder(self) -> str:
        running = self.running()
        if running is None:
            return f"another `perdure up` is starting on state folder {self.path}"
        return (
            f"cluster {running.cluster!r} already runs on state folder {self.path}: pid {running.pid}, "
            f"{running.urls[0]} (stop it, or give --state-dir and --port of your own)"
        )


def write_json(path: Path, running: RunningCluster) -> None:
    """Replace `path` in one step, so that a reader sees all or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(running), indent=2) + "\n")
    partial.replace(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
