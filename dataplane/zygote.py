"""The zygote: a process with everything imported that a rank needs, from which ranks are forked in milliseconds.

Run as `python -m dataplane.zygote FD DAEMON_PID ENTRY [MODULE ...]`. It speaks msgspec messages over the SOCK_SEQPACKET
socket FD with the daemon that executed it, and holds no other socket. It imports and does nothing else: a child of a
process that has run one multi-threaded tensor operation hangs in its own first one for ever, so it forks only while it
has a single thread. ENTRY is `module:function`, called in each rank as `function(socket_path, device, page_path)`.

Parent-death signals chain: the kernel kills the zygote when its daemon dies, and the ranks when the zygote dies.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

MESSAGE_BYTES_MAX = 64 * 1024

EXIT_FAILED = 1
EXIT_DEVICE_BUSY = 75
"""Another process holds the device (EX_TEMPFAIL of sysexits.h)."""

EXIT_ORPHANED = 76

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

THREAD_CHECK_S = 0.1
THREAD_CHECKS_MAX = 50
"""Imports leave helper threads that end soon: how often and how many times to look again."""

LOCK_CHECK_S = 0.01

RankEntry = Callable[[str, str, str], None]


class Message(msgspec.Struct, frozen=True, array_like=True, tag_field="type"):
    """Base of all messages; one a packet."""


class Fork(Message, frozen=True, tag=True):
    """Make a rank. Answered by Forked or ForkFailed, later by Exited."""

    device: str
    socket_path: str
    page_path: str
    lock_path: str
    log_path: str
    # How long the rank waits for a dying predecessor to let go of the device.
    lock_wait_ms: int


class Ready(Message, frozen=True, tag=True):
    """All is imported."""


class Forked(Message, frozen=True, tag=True):
    device: str
    pid: int


class ForkFailed(Message, frozen=True, tag=True):
    device: str
    text: str


class Exited(Message, frozen=True, tag=True):
    pid: int
    # As os.waitpid gives it.
    status: int


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Fork | Ready | Forked | ForkFailed | Exited).decode


def die_with_parent(parent: int) -> None:
    """From now on the kernel kills this process when its parent's main thread ends. Exits if that has happened already.

    To be called from the main thread, by a child whose parent forked it from its main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(EXIT_ORPHANED)


def hold_device(lock_path: str, wait: float) -> int | None:
    """Take the device's lock, for this process's life; None if another process keeps it for `wait` seconds."""
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(LOCK_CHECK_S)
            continue
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return descriptor


class Zygote:
    """The loop: fork what is asked for, report who ended."""

    def __init__(self, control: socket.socket, entry: RankEntry) -> None:
        self._control = control
        self._entry = entry
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)

    def run(self) -> None:
        """Until the daemon closes its end."""
        self._send(Ready())
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._wake_reader:
                    os.read(self._wake_reader, MESSAGE_BYTES_MAX)
                    self._reap()
                    continue
                packet = self._control.recv(MESSAGE_BYTES_MAX)
                if not packet:
                    return
                message = decode(packet)
                assert isinstance(message, Fork), "a daemon sends nothing else"
                self._fork(message)

    def _fork(self, message: Fork) -> None:
        threads = _settled_threads()
        if len(threads) > 1:
            self._send(ForkFailed(message.device, f"the zygote has {len(threads)} threads: {', '.join(threads)}"))
            return
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_rank(message, zygote)
        self._send(Forked(message.device, pid))

    def _become_rank(self, message: Fork, zygote: int) -> NoReturn:
        code = EXIT_FAILED
        try:
            die_with_parent(zygote)
            self._let_go_of_the_zygote()
            _redirect_output(message.log_path)
            _name_process(f"rank {message.device}")
            code = _run_rank(message, self._entry)
        finally:
            # No clean-up of what the zygote set up: interpreter exit would run it a second time.
            os._exit(_last_words(sys.exc_info()[1], code))

    def _let_go_of_the_zygote(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        self._control.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._send(Exited(pid, status))

    def _send(self, message: Message) -> None:
        self._control.send(encode(message))


def _run_rank(message: Fork, entry: RankEntry) -> int:
    """The rank's whole life. Its exit code."""
    if hold_device(message.lock_path, message.lock_wait_ms / 1000) is None:
        holder = Path(message.lock_path).read_text() or "unknown"
        sys.stderr.write(f"{message.device} is held by process {holder}\n")
        return EXIT_DEVICE_BUSY
    entry(message.socket_path, message.device, message.page_path)
    return 0


def _last_words(error: BaseException | None, code: int) -> int:
    """Log why the rank ends. Its exit code."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
    elif error is not None:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _settled_threads() -> list[str]:
    """Names of this process's threads, once only one is left or patience is."""
    names: list[str] = []
    for _ in range(THREAD_CHECKS_MAX):
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        if len(names) == 1:
            break
        time.sleep(THREAD_CHECK_S)
    return names


def _redirect_output(log_path: str) -> None:
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _name_process(name: str) -> None:
    # The kernel keeps 15 characters; ps and top show them.
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def resolve_entry(text: str) -> RankEntry:
    """The function named by `module:function`."""
    module, _, function = text.partition(":")
    return getattr(importlib.import_module(module), function)


def main() -> None:
    """Import, then serve the daemon."""
    descriptor, daemon, entry, *modules = sys.argv[1:]
    die_with_parent(int(daemon))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(descriptor))
    control.set_inheritable(False)
    for module in modules:
        importlib.import_module(module)
    Zygote(control, resolve_entry(entry)).run()


if __name__ == "__main__":
    main()
