"""Real processes that want a processor and have none, and such that want none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from dataplane.processes import process_state
from dataplane.starvation import Starvation

SPINS = "while True: pass"
A_THREAD_SPINS = """
import threading
threading.Thread(target=exec, args=("while True: pass",)).start()
threading.Event().wait()
"""
LOOKS = 20
LOOK_S = 0.05
LIMIT_S = 60.0

Start = Callable[[str, int], int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Runs a text of Python in a process with so many threads, all of them last in line on one processor, which another
    process keeps busy."""
    children: list[subprocess.Popen[bytes]] = []

    def begin(text: str, threads: int) -> int:
        child = subprocess.Popen([sys.executable, "-c", text])
        children.append(child)
        until(lambda: len(os.listdir(f"/proc/{child.pid}/task")) == threads)
        for thread in map(int, os.listdir(f"/proc/{child.pid}/task")):
            os.sched_setaffinity(thread, {min(os.sched_getaffinity(0))})
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        return child.pid

    busy = subprocess.Popen([sys.executable, "-c", SPINS])
    children.append(busy)
    os.sched_setaffinity(busy.pid, {min(os.sched_getaffinity(0))})
    until(lambda: process_state(busy.pid) == "R")
    yield begin
    for child in children:
        child.kill()
        child.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def starved_share(pid: int) -> float:
    """Of the time between the first look and the last."""
    starvation, starved_s = Starvation(pid), 0.0
    begun = now = time.monotonic()
    starvation.look(now)
    for _ in range(LOOKS):
        time.sleep(LOOK_S)
        now = time.monotonic()
        starved_s += starvation.look(now)
    return starved_s / (now - begun)


@pytest.mark.parametrize(("text", "threads"), [(SPINS, 1), (A_THREAD_SPINS, 2)], ids=["process", "thread"])
def test_who_comes_last_on_a_busy_processor_is_starved(start: Start, text: str, threads: int) -> None:
    pid = start(text, threads)
    until(lambda: starved_share(pid) > 0.6)


def test_who_is_stopped_wants_no_processor(start: Start) -> None:
    pid = start(SPINS, 1)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: process_state(pid) == "T")
    until(lambda: starved_share(pid) < 0.1)


def test_a_first_look_says_nothing(start: Start) -> None:
    starvation = Starvation(start(SPINS, 1))
    assert starvation.look(10.0) == 0
    starvation.forget()
    assert starvation.look(20.0) == 0


def test_a_process_that_is_gone_is_not_starved() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    until(lambda: starved_share(child.pid) < 0.1)
