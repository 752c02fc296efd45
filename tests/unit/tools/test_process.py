"""Children come back, give up, stop, and die with their parent."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from controlplane.runtime.timing import derive_timings
from tests.support.cluster import eventually
from tools.up.process import Child, ChildFailed, ChildSpec, describe_exit

SLEEPER = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
)
PARENT = """
import asyncio, sys
from pathlib import Path
from controlplane.runtime.timing import derive_timings
from tools.up.process import Child, ChildSpec

async def main():
    spec = ChildSpec("c", (sys.executable, "-c", "import time; time.sleep(600)"), Path(sys.argv[1]))
    child = Child(spec, derive_timings(), print)
    await child.start()
    print(child.pid, flush=True)
    await child.supervise()

asyncio.run(main())
"""


def child(tmp_path: Path, code: str, notices: list[str]) -> Child:
    spec = ChildSpec("worker-0", (sys.executable, "-c", code), tmp_path / "log")
    return Child(spec, derive_timings(1.0, 0.1), notices.append)


async def test_what_is_killed_comes_back(tmp_path: Path) -> None:
    notices: list[str] = []
    sleeper = child(tmp_path, SLEEPER, notices)
    await sleeper.start()
    first = sleeper.pid
    supervision = asyncio.create_task(sleeper.supervise())
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await eventually("it is back", lambda: sleeper.running and sleeper.pid != first)
    assert notices[0] == "worker-0 was killed by SIGKILL; starting it again"
    await eventually("its return is told", lambda: notices[1:] == [f"worker-0 is back, pid {sleeper.pid}"])
    await sleeper.stop(patience_s=10)
    assert not sleeper.running
    await supervision


async def test_what_dies_at_once_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    notices: list[str] = []
    broken = child(tmp_path, "raise SystemExit('no such thing')", notices)
    await broken.start()
    with pytest.raises(ChildFailed, match=r"(?s)worker-0 exited with code 1 5 times; .*log ends:.*no such thing"):
        await broken.supervise()
    assert len(notices) == 8


async def test_what_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = child(tmp_path, STUBBORN, [])
    await stubborn.start()
    await eventually("it is deaf", lambda: (tmp_path / "log").read_text() == "deaf\n")
    await stubborn.stop(patience_s=0.1)
    assert not stubborn.running


def test_no_child_outlives_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    orphan = os.pidfd_open(int(parent.stdout.readline()))
    try:
        assert not select.select([orphan], [], [], 0)[0]
        parent.kill()
        parent.wait()
        assert select.select([orphan], [], [], 30)[0]
    finally:
        os.close(orphan)
        parent.stdout.close()


def test_exits_in_words() -> None:
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(3) == "exited with code 3"
