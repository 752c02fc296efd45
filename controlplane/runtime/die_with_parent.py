"""Starting a program that never outlives its parent.

Run as a script, it asks the kernel for a signal at the parent's death and becomes the program (`execv` keeps the
request). It is no `preexec_fn`: that would run Python between fork and exec of a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def command(program: list[str], ended_by: signal.Signals = signal.SIGTERM) -> list[str]:
    """The command line that runs `program` as a child of this process, to be ended by a signal when the *thread* that
    starts it ends: start it from the main thread."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(ended_by.value), *program]


def main(parent: int, ended_by: int, program: list[str]) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, ended_by) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died before the request: then nobody will send the signal.
    if os.getppid() == parent:
        os.execv(program[0], program)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
