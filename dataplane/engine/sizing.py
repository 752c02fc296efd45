"""How much memory the KV cache gets.

On an accelerator: what `mem_fraction_static` of the device leaves beside the weights and the largest step. On a CPU the
memory belongs to everyone on the machine, so the cache takes at most an eighth of what is available at start (several
ranks may start at once, and a laptop has other uses for it), and never more than all sequences at full length need.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CPU_SHARE = 8
"""On a CPU the cache takes at most one part in so many of the available memory."""

_CGROUP = Path("/sys/fs/cgroup")


def cache_bytes(device: torch.device, fraction: float, step_bytes: int) -> int:
    """Memory for the KV cache, weights being loaded already. `step_bytes`: what the largest step takes besides."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(int(total * fraction) - (total - free) - step_bytes, 0)
    return max(int(min(available_bytes() / CPU_SHARE, available_bytes() * fraction - step_bytes)), 0)


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its control group's if that is less."""
    available = int(psutil.virtual_memory().available)
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    return available if limit is None or used is None else max(min(available, limit - used), 0)


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # Absent, or "max".
        return None


def count_blocks(bytes_max: int, bytes_a_block: int, block_tokens: int, sequences: int, model_tokens: int) -> int:
    """Blocks within `bytes_max`, but no more than `sequences` of `model_tokens` can fill. May be 0."""
    useful = sequences * -(-model_tokens // block_tokens)
    return min(bytes_max // bytes_a_block, useful)
