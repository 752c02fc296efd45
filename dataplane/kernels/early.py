"""Launches that overlap the end of the kernel before (programmatic dependent launch, from compute capability 9.0 on).

A kernel that is launched early waits in its first line until all before it is done and visible. What is saved is the
launch itself: about a microsecond of each of a decode step's small kernels.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def is_early() -> bool:
    """Whether this GPU can."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def options() -> dict[str, bool]:
    """For the launch of a kernel that waits."""
    return {"launch_pdl": True} if is_early() else {}
