"""One cluster a state folder; a killed one blocks no later one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.up.state import RunningCluster, StateDir, StateError, default_state_dir

HOLDER = """
import sys, time
from pathlib import Path
from tools.up.state import StateDir
with StateDir(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(600)
"""


def running(pid: int) -> RunningCluster:
    return RunningCluster(
        cluster="local",
        pid=pid,
        urls=["http://127.0.0.1:8000"],
        addresses=["127.0.0.1:7700"],
        etcd=["127.0.0.1:2379"],
        model="m",
        processes={"cp-0": pid},
    )


def test_a_second_holder_is_refused_with_the_firsts_pid_and_url(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    with state.locked():
        with pytest.raises(StateError, match="another `perdure up` is starting"), state.locked():
            pass
        state.write_running(running(os.getpid()))
        with pytest.raises(StateError, match=rf"pid {os.getpid()}, http://127\.0\.0\.1:8000"), state.locked():
            pass
        assert state.running() == running(os.getpid())
    assert state.running() is None
    with state.locked():
        pass


def test_a_killed_holder_leaves_the_folder_free(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(StateError), StateDir(tmp_path).locked():
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    StateDir(tmp_path).write_running(running(process.pid))
    assert StateDir(tmp_path).running() is None
    with StateDir(tmp_path).locked():
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="cannot be used: Not a directory"), StateDir(tmp_path / "file" / "x").locked():
        pass


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_state_dir("lab") == tmp_path / ".perdure" / "lab"
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert default_state_dir("lab") == Path("/var/state/perdure/lab")
