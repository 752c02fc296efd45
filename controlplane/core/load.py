"""What a replica has to do, as the leader sees it: its last heartbeat, plus what that heartbeat cannot know yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from controlplane.runtime.ids import RequestId
from controlplane.runtime.messages.common import Capacity
from controlplane.runtime.messages.session import ReplicaLoad

RECENT_HASHES_MAX = 4096
"""Prefix hashes of requests just sent, until the replica's own digest tells of them."""


@dataclass(slots=True, kw_only=True)
class Unseen:
    """An assignment that no heartbeat counts yet."""

    sequences: int
    prefill_tokens: int
    blocks: int
    # The Assign's number in the session, once sent; a heartbeat that acknowledges it counts it.
    seq: int | None = None


@dataclass(slots=True)
class _Sum:
    """Of what unseen assignments ask."""

    sequences: int = 0
    prefill_tokens: int = 0
    blocks: int = 0

    def add(self, unseen: Unseen, sign: int) -> None:
        self.sequences += sign * unseen.sequences
        self.prefill_tokens += sign * unseen.prefill_tokens
        self.blocks += sign * unseen.blocks


@dataclass(slots=True)
class Load:
    """Outstanding work of one replica epoch."""

    heartbeat: ReplicaLoad | None = None
    # Requests assigned to the epoch whose End did not come.
    outstanding: set[RequestId] = field(default_factory=set[RequestId])
    unseen: dict[RequestId, Unseen] = field(default_factory=dict[RequestId, Unseen])
    # Kept beside `unseen`: a replica's load is asked for far more often than it changes.
    _unseen_sum: _Sum = field(default_factory=_Sum)
    _digest: bytes = b""
    _cached: frozenset[int] = frozenset()
    _recent: OrderedDict[int, None] = field(default_factory=OrderedDict[int, None])

    def heard(self, heartbeat: ReplicaLoad, ack: int) -> None:
        """Take a heartbeat that was sent after the peer received our frame number `ack`."""
        self.heartbeat = heartbeat
        for request, unseen in list(self.unseen.items()):
            if unseen.seq is not None and unseen.seq <= ack:
                self._see(request)
        if heartbeat.prefix_digest != self._digest:
            self._digest = heartbeat.prefix_digest
            self._cached = frozenset(_hashes(heartbeat.prefix_digest))

    def assigned(self, request: RequestId, unseen: Unseen, prefix_hashes: Iterable[int]) -> None:
        self.outstanding.add(request)
        self._see(request)
        self.unseen[request] = unseen
        self._unseen_sum.add(unseen, 1)
        for prefix in prefix_hashes:
            self._recent[prefix] = None
            self._recent.move_to_end(prefix)
        while len(self._recent) > RECENT_HASHES_MAX:
            self._recent.popitem(last=False)

    def sent(self, request: RequestId, seq: int) -> None:
        """The request's Assign left as our frame number `seq`."""
        if request in self.unseen:
            self.unseen[request].seq = seq

    def ended(self, request: RequestId) -> None:
        self.outstanding.discard(request)
        self._see(request)

    def check(self) -> None:
        """Assert that what is kept beside `unseen` agrees with it."""
        total = _Sum()
        for unseen in self.unseen.values():
            total.add(unseen, 1)
        assert total == self._unseen_sum, "unseen assignments are miscounted"

    def _see(self, request: RequestId) -> None:
        """Its assignment is counted no more, or by heartbeats."""
        unseen = self.unseen.pop(request, None)
        if unseen is not None:
            self._unseen_sum.add(unseen, -1)

    @property
    def sequences(self) -> int:
        """Sequences it runs or will run."""
        seen = self.heartbeat.running + self.heartbeat.waiting if self.heartbeat else 0
        return seen + self._unseen_sum.sequences

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens it must compute before a newcomer's first."""
        seen = self.heartbeat.waiting_tokens if self.heartbeat else 0
        return seen + self._unseen_sum.prefill_tokens

    def free_blocks(self, capacity: Capacity) -> int:
        """KV blocks that are left once the unseen assignments have theirs; may be negative."""
        free = self.heartbeat.free_blocks if self.heartbeat else capacity.total_blocks
        return free - self._unseen_sum.blocks

    @property
    def step_s(self) -> float:
        """Recent step time in seconds; 0 before the first one is known."""
        return self.heartbeat.step_ms / 1000 if self.heartbeat else 0.0

    @property
    def busy(self) -> bool:
        """It has work by its own account."""
        return self.heartbeat is not None and self.heartbeat.running + self.heartbeat.waiting > 0

    def cached_blocks(self, prefix_hashes: Iterable[int]) -> int:
        """How many leading blocks of a prompt it probably has in its prefix cache. A hint."""
        count = 0
        for prefix in prefix_hashes:
            if prefix not in self._cached and prefix not in self._recent:
                break
            count += 1
        return count


def _hashes(digest: bytes) -> Iterable[int]:
    view = memoryview(digest)[: len(digest) // 8 * 8]
    return (int.from_bytes(view[start : start + 8], "little") for start in range(0, len(view), 8))
