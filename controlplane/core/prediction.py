"""How long a request would take on a replica: what the scheduler minimises.

Seconds until its last token, from the replica's measured step time and what it has to do already. Steps are counted:
those that prefill what stands before it and its own uncached prompt, those it waits for a slot in the batch or for KV
blocks, and its own decode steps, which a fuller batch makes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from statistics import median

from controlplane.core.load import Load, Unseen
from controlplane.runtime.messages.common import Capacity
from controlplane.runtime.messages.route import RouteEntry

CROWDING = 1.0
"""How much longer a decode step of a full batch is taken to be than that of a lone sequence: decode reads the same
weights for all, so far less than in proportion (measured: 0.3 for 8B on an H100, 3 for 270M on two CPU cores)."""

STEP_S_GUESS = 0.02
"""Step time where none was measured yet."""

SAME_PACE = 1.5
"""Step times of equal replicas differ by chance; below this factor from the typical one they count as equal, else the
noise of a measurement would send a whole wave to one replica."""


def pace(loads: Sequence[Load], capacities: Sequence[Capacity]) -> list[float]:
    """Seconds that a lone sequence's step takes on each replica of one deployment.

    Only a replica at work says something of itself: an idle one's last step was its warm-up, or long ago.
    """
    lone = [lone_step_s(load, capacity) if load.busy else 0.0 for load, capacity in zip(loads, capacities, strict=True)]
    measured = [value for value in lone if value > 0]
    typical = median(measured) if measured else STEP_S_GUESS
    return [value if value > typical * SAME_PACE or 0 < value < typical / SAME_PACE else typical for value in lone]


def lone_step_s(load: Load, capacity: Capacity) -> float:
    """Seconds that a lone sequence's step would take there, by its last step; 0 before its first."""
    return load.step_s / (1 + CROWDING * load.sequences / capacity.max_sequences)


def demand(entry: RouteEntry, capacity: Capacity, cached_blocks: int) -> Unseen:
    """What the request will ask of a replica."""
    return Unseen(
        sequences=entry.n,
        prefill_tokens=_prefill_tokens(entry, capacity, cached_blocks),
        blocks=_blocks(entry, capacity),
    )


def predicted_s(entry: RouteEntry, load: Load, capacity: Capacity, step_s: float) -> float:
    """Seconds until the last token, on a replica whose steps take `step_s`."""
    own = _prefill_tokens(entry, capacity, load.cached_blocks(entry.prefix_hashes))
    prefill_steps = (load.prefill_tokens + own) / capacity.max_batch_tokens
    decode_steps = _decode_steps(entry)
    occupancy = load.sequences / capacity.max_sequences
    over = max(0.0, occupancy + entry.n / capacity.max_sequences - 1.0)
    short = max(0, _blocks(entry, capacity) - load.free_blocks(capacity)) / max(1, capacity.total_blocks)
    waiting_steps = (over + short) * decode_steps
    return step_s * (prefill_steps + waiting_steps + decode_steps * (1 + CROWDING * occupancy))


def congestion_s(entries: Sequence[RouteEntry], capacity: Capacity, step_s: float) -> float:
    """Seconds that one more request of such a batch adds to the next one on the same replica."""
    steps = sum(
        _prefill_tokens(entry, capacity, 0) / capacity.max_batch_tokens
        + CROWDING * entry.n / capacity.max_sequences * _decode_steps(entry)
        for entry in entries
    )
    return step_s * steps / len(entries)


def fits(entry: RouteEntry, capacity: Capacity) -> bool:
    """The replica can hold the request at all, with one token to come."""
    tokens = entry.prompt_tokens + 1
    limit = capacity.max_model_tokens
    return (not limit or tokens <= limit) and ceil(tokens / capacity.block_tokens) <= capacity.total_blocks


def _prefill_tokens(entry: RouteEntry, capacity: Capacity, cached_blocks: int) -> int:
    # the last token is always computed: its logits are the first draw
    return max(1, entry.prompt_tokens + entry.delivered_tokens - cached_blocks * capacity.block_tokens)


def _decode_steps(entry: RouteEntry) -> int:
    return max(1, entry.max_tokens - entry.delivered_tokens)


def _blocks(entry: RouteEntry, capacity: Capacity) -> int:
    """KV blocks at its end: the prompt's are shared by its choices."""
    return ceil(entry.prompt_tokens / capacity.block_tokens) + entry.n * ceil(entry.max_tokens / capacity.block_tokens)
