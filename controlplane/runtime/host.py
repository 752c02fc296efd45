"""This machine and its processes, as far as one process may judge another dead."""

from __future__ import annotations

import os
from pathlib import Path


def boot_id() -> str:
    """Equal in two processes only if process ids mean the same in both: same boot of the same machine, same pid
    namespace. Two containers of one host differ."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{boot}/{namespace}"


def process_is_dead(pid: int) -> bool:
    """True if no process of this pid namespace has the id, or only an unreaped one, or this very process (the id was
    used again)."""
    if pid == os.getpid():
        return True
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    # The state stands after the command, which is in parentheses and may hold any character.
    return status.rpartition(")")[2].split()[0] in ("Z", "X")
