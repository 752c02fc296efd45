"""What /proc tells of a process on this machine."""

from __future__ import annotations

from pathlib import Path

_EXITING = 0x4
"""PF_EXITING of the kernel's process flags."""

_STATE, _FLAGS, _EXIT_CODE = 0, 6, 49
"""Fields of /proc/<pid>/stat, counted from the one after the command."""


def process_state(pid: int) -> str:
    """The state letter: R, S, D, T (stopped), Z (dead, not reaped); "" if there is no such process."""
    fields = _stat(pid)
    return fields[_STATE] if fields else ""


def dying_status(pid: int) -> int | None:
    """The wait status of a process that is on its way out: the kernel knows it long before a large process's memory
    is given back and its parent may reap it. None if it is not dying, or gone."""
    fields = _stat(pid)
    if not fields or not (int(fields[_FLAGS]) & _EXITING or fields[_STATE] in "ZX"):
        return None
    return int(fields[_EXIT_CODE])


def oom_kills() -> int:
    """Processes that the kernel has killed for want of memory, since boot."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    # The command is in parentheses and may hold any character.
    return text.rpartition(")")[2].split()
