"""Judging a process of this machine dead."""

from __future__ import annotations

import os
import subprocess
import sys

from controlplane.runtime import host


def test_this_boot_has_one_id() -> None:
    assert host.boot_id() == host.boot_id()
    assert len(host.boot_id()) > 36


def test_a_running_process_is_alive_and_an_ended_one_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not host.process_is_dead(process.pid)
    process.kill()
    # Ended but not yet reaped: it runs no more.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert host.process_is_dead(process.pid)
    process.wait()
    assert host.process_is_dead(process.pid)


def test_an_id_that_is_ours_now_was_someone_elses() -> None:
    assert host.process_is_dead(os.getpid())
    assert not host.process_is_dead(os.getppid())
