"""Sums over the GPUs of one host without NCCL: each writes to all others (kernels/one_shot.py).

The memory is torch's symmetric memory. Between two GPUs nothing moves fewer bytes; among more, what a rank writes grows
with their number, so larger tensors stay with NCCL.

A wait that a peer's death would make endless is ended from this side, by `abort`: no rank has to be killed for another.
So a captured step may hold these sums, as it must not hold NCCL's, whose abort waits until the graph is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d

_c10d: Any = _distributed_c10d
"""Its C++ bindings have no types."""

SENT_BYTES_MAX = 4 * 1024 * 1024
"""What a rank writes to its peers in one exchange."""


class DeviceBoard:
    """One rank's view of a group's board."""

    def __init__(self, store: Any, name: str, rank: int, ranks: int, device: torch.device) -> None:
        """All ranks together. `store` is theirs alone, and `name` was never used before in this process. Raises
        RuntimeError where memory cannot be shared."""
        # Only here: Triton is there where a GPU is.
        from dataplane.kernels import one_shot

        self._kernel = one_shot
        self._rank = rank
        self._slot_bytes = slot_bytes(ranks)
        parts = self._slot_bytes // one_shot.PART_BYTES
        size = one_shot.buffer_bytes(ranks, parts, self._slot_bytes)
        with torch.cuda.device(device):
            self._memory = _share(store, name, rank, ranks, size, device)
            self._buffers_R = _addresses(self._memory, ranks, size, device)
            self._counts = torch.zeros(parts, dtype=torch.int64, device=device)
            flags = self._memory.get_buffer(rank, (ranks * parts,), torch.int64)
            flags.zero_()
            self._flags = flags
            # Ready beforehand: what aborts must not need memory or a kernel.
            self._ended = torch.full((ranks * parts,), one_shot.ABORTED, dtype=torch.int64).pin_memory()
            self._aside = torch.cuda.Stream(device)
            torch.cuda.synchronize(device)

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is summed here."""
        return (
            x.is_cuda
            and x.is_contiguous()
            and x.is_floating_point()
            and x.element_size() <= torch.float32.itemsize
            and x.numel() * x.element_size() <= self._slot_bytes
        )

    def sum(self, x: Tensor) -> Tensor:
        """Every rank's `x` added up, the same bits on every rank; launched, not waited for."""
        return self._kernel.sum_over_ranks(x, self._buffers_R, self._counts, self._rank, self._slot_bytes)

    def abort(self) -> None:
        """End every wait of this rank, now and later. From any thread."""
        with torch.cuda.stream(self._aside):
            self._flags.copy_(self._ended, non_blocking=True)


def slot_bytes(ranks: int) -> int:
    """The largest tensor that goes over a board of so many ranks: a power of two."""
    return 1 << (SENT_BYTES_MAX // (ranks - 1)).bit_length() - 1


def is_reachable(identities: Sequence[str], device: torch.device) -> bool:
    """Whether `device` can read the memory of the GPUs that `identify` named, its own among them."""
    indices = {_identity(index): index for index in range(torch.cuda.device_count())}
    own = _index(device)
    if len(set(identities)) < len(identities) or not set(identities) <= set(indices):
        return False
    peers = (indices[item] for item in identities)
    return all(peer == own or torch.cuda.can_device_access_peer(own, peer) for peer in peers)


def identify(device: torch.device) -> str:
    """A GPU's name, whatever index it has in a process."""
    return _identity(_index(device))


def _identity(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _share(store: Any, name: str, rank: int, ranks: int, size: int, device: torch.device) -> Any:
    # It exchanges nothing: torch asks it who takes part, and for the store. The registry does not keep it alive.
    group = _c10d.ProcessGroup(store, rank, ranks)
    _c10d._register_process_group(name, group)
    try:
        memory = _c10d._SymmetricMemory
        own = memory.empty_strided_p2p((size,), (1,), torch.uint8, torch.device("cuda", _index(device)), name)
        return memory.rendezvous(own, name)
    finally:
        _c10d._unregister_process_group(name)


def _addresses(memory: Any, ranks: int, size: int, device: torch.device) -> Tensor:
    buffers = [memory.get_buffer(rank, (size,), torch.uint8).data_ptr() for rank in range(ranks)]
    return torch.tensor(buffers, dtype=torch.int64, device=device)
