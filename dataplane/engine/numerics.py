"""Whether a sequence's tokens depend on the batch that they are computed in, and what a replica may say about it."""

from __future__ import annotations

import torch

from controlplane.runtime.errors import invalid

EXACT = "exact"
FAST = "fast"


def is_exact(wanted: str, device: torch.device) -> bool:
    """Whether to compute batch-invariantly. "auto": where that costs nothing. Raises Rejected for another word.

    On a CPU the exact way is the fastest, and the only one.
    """
    if wanted not in ("auto", EXACT, FAST):
        raise invalid(f"numerics {wanted!r} is none of auto, {EXACT}, {FAST}")
    return wanted == EXACT or device.type == "cpu"


def promise(wanted: str, device: torch.device, ranks: int) -> str:
    """What holds for the text of a replica whose layers are cut over `ranks`, in words for its status."""
    if not is_exact(wanted, device):
        return f"{FAST}: a replay or another batch may end in another, equally valid text"
    if device.type == "cuda" and ranks > 1:
        return f"{EXACT} within a rank; NCCL chooses the order of sums between ranks by a step's size"
    return f"{EXACT}: the same text in any batch, in chunks, over cached prefixes and after a replay"
