"""`perdure up` as a user meets it: what it refuses, what it serves, what heals, what it leaves behind."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import ROOT, free_port
from tests.support.models import tiny_model

PERDURE = (sys.executable, "-m", "tools.cli")
READY_S = 120.0
GONE_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


def perdure(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [*PERDURE, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=READY_S,
        check=False,
    )


class Up:
    """One running `perdure up` or `perdure serve`."""

    def __init__(self, folder: Path, command: str, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        self.state_dir = folder / "state"
        self.ready_file = folder / "ready.json"
        self.ready_file.unlink(missing_ok=True)
        self.log = folder / "up.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*PERDURE, command, *arguments),
                    *("--state-dir", str(self.state_dir)),
                    *("--ready-file", str(self.ready_file)),
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def until(self, what: str, condition: Any, timeout_s: float = READY_S) -> Any:
        """Poll `condition` until it is true; fail with the log when the process ends or time is up."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert self.process.poll() is None, f"perdure up ended before {what}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"{what} did not come true:\n{self.log.read_text()}"
            time.sleep(0.05)
        return found

    def ready(self) -> dict[str, Any]:
        self.until("it is ready", self.ready_file.exists)
        return json.loads(self.ready_file.read_text())

    def running(self) -> dict[str, Any]:
        return json.loads((self.state_dir / "running.json").read_text())

    def address(self) -> str:
        return self.running()["addresses"][0]

    def pids(self) -> list[int]:
        """Every process of the cluster: `up`, its children and theirs."""
        family = {self.process.pid}
        parents = {
            int(stat.parent.name): int(text.rpartition(")")[2].split()[1])
            for stat in Path("/proc").glob("[0-9]*/stat")
            if (text := _read(stat))
        }
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return sorted(family)


@contextmanager
def up(folder: Path, *arguments: str, command: str = "up") -> Iterator[Up]:
    running = Up(folder, command, *arguments)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.wait()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def expect_gone(pids: list[int], end: Any) -> None:
    """Open every process, call `end`, and see each of them end."""
    handles = []
    for pid in pids:
        try:
            handles.append(os.pidfd_open(pid))
        except ProcessLookupError:
            continue
    try:
        end()
        deadline = time.monotonic() + GONE_S
        for handle in handles:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([handle], [], [], left)[0], "a process is left"
    finally:
        for handle in handles:
            os.close(handle)


def complete(url: str, model: str, tokens: int = 8) -> str:
    body = {"model": model, "prompt": "The river", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["text"]


@pytest.mark.cluster
def test_serves_heals_and_leaves_nothing(tmp_path: Path, model: Path) -> None:
    port = free_port()
    flags = ("--model", str(model), "--served-model-name", "tiny", "--dtype", "float32", "--port", str(port))
    with up(tmp_path, *flags) as first:
        ready = first.ready()
        assert ready["urls"] == [f"http://127.0.0.1:{port}"]
        assert set(ready["processes"]) == {"etcd", "cp-0", "worker-0", "worker-1"}
        text = complete(ready["urls"][0], "tiny")
        assert f"Serving tiny at http://127.0.0.1:{port}/v1" in first.log.read_text()

        second = perdure("up", "--state-dir", str(first.state_dir), "--model", str(model))
        assert second.returncode == 2
        assert f"pid {first.process.pid}, http://127.0.0.1:{port}" in second.stderr

        os.kill(ready["processes"]["worker-0"], signal.SIGKILL)
        first.until("the worker is back", lambda: "worker-0 is back" in first.log.read_text())
        assert first.running()["processes"]["worker-0"] != ready["processes"]["worker-0"]
        assert complete(ready["urls"][0], "tiny") == text

        expect_gone(first.pids(), lambda: first.process.send_signal(signal.SIGINT))
        assert first.process.wait() == 0
        assert first.log.read_text().endswith("Stopped.\n")

    # The same folder again, with etcd's data of the first: another number of workers and other times.
    with up(tmp_path, *flags, "--workers", "1", "--failure-timeout", "6", "--heartbeat-interval", "1") as again:
        ready = again.ready()
        assert complete(ready["urls"][0], "tiny") == text
        status = json.loads(perdure("ctl", "status", "--json", "--address", again.address()).stdout)
        assert [row["id"] for row in status["nodes"] if row["state"] == "live"] == ["worker-0"]
        assert status["timing"] == {"failure_timeout_ms": 6000, "heartbeat_interval_ms": 1000}
        assert status["leader"]["pid"] == ready["processes"]["cp-0"]
        expect_gone(again.pids(), again.process.kill)


@pytest.mark.cluster
@pytest.mark.chaos
def test_one_command_a_host_makes_one_cluster(tmp_path: Path, model: Path) -> None:
    ports = [str(free_port()) for _ in range(3)]
    flags = [
        *("--model-path", str(model), "--dtype", "float32", "--world-size", "2"),
        *("--master-port", ports[0], "--grpc-port", ports[1], "--port", ports[2]),
    ]
    with (
        up(tmp_path / "a", *flags, "--rank", "0", command="serve") as first,
        up(tmp_path / "b", *flags, "--rank", "1", command="serve") as second,
    ):
        assert set(first.ready()["processes"]) == {"etcd", "cp-0", "worker-0"}
        assert set(second.ready()["processes"]) == {"worker-1"}
        assert second.ready()["urls"] == [f"http://127.0.0.1:{ports[2]}"]
        assert complete(second.ready()["urls"][0], model.name)
        for running in (second, first):
            expect_gone(running.pids(), running.process.terminate)
            assert running.process.wait() == 0


@pytest.mark.cluster
def test_a_model_that_no_engine_can_load_ends_it_with_the_reason(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 9}))
    with up(tmp_path, "--model", str(broken), "--port", str(free_port()), "--workers", "1") as running:
        expect_gone(running.pids(), lambda: running.process.wait(READY_S))
        assert running.process.returncode == 2
        assert "cannot be brought up: " in running.log.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--model", "/no/such/model"), "perdure up: model /no/such/model does not exist\n"),
        (("--config", "/no/such.yaml"), "perdure up: /no/such.yaml: cannot be read: No such file or directory\n"),
        (("--tp", "0"), "perdure up: --tensor-parallel-size: parallelism.tensor_parallel_size: must be greater"),
        (("--device", "cuda"), "perdure up: --device cuda: nvidia-smi shows no GPU on this machine\n"),
        (("--ready-file", "/no/such/file"), "perdure up: /no/such/file cannot be written: /no/such is no folder\n"),
        (("--failure-timeout", "1"), "perdure up: --failure-timeout: fault_tolerance.failure_timeout: failure_timeout"),
    ],
)
def test_refused_before_anything_starts(tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    result = perdure("up", "--state-dir", str(tmp_path / "state"), "--port", str(free_port()), *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(complaint)
    assert not (tmp_path / "state" / "etcd").exists()


def test_a_busy_port_is_named_with_its_owner(tmp_path: Path, model: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        result = perdure("up", "--state-dir", str(tmp_path / "s"), "--model", str(model), "--port", str(port))
    assert result.returncode == 2
    assert f"port {port} for gateway cp-0 is busy: pid {os.getpid()} " in result.stderr


def test_ctl_says_in_one_line_that_nothing_answers(tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    result = perdure("ctl", "status", "--address", nobody)
    assert (result.returncode, result.stderr) == (1, f"perdure ctl: nothing answers at {nobody}\n")
    assert perdure("ctl", "status", "--address", "head").stderr == "perdure ctl: 'head' is not HOST:PORT\n"
    result = perdure("ctl", "status", HOME=str(tmp_path), XDG_STATE_HOME="", PERDURE_ADDRESS="")
    assert result.returncode == 1
    assert result.stderr.startswith(f"perdure ctl: no cluster runs on {tmp_path}/.perdure/local: give --address")


def test_help_needs_neither_torch_nor_grpc() -> None:
    code = (
        "import sys; sys.argv = ['perdure', '--help']\n"
        "from tools.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code\n"
        "print([name for name in ('torch', 'transformers', 'grpc', 'aiohttp') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
