"""How long a replica with work has stood still: the evidence by which it is judged to hang.

Time is what the nodes' own clocks say of it, and counts only as far as the ranks could have moved: not while one of
them wanted a processor and had none, nor while the daemon that watches them did not run. So neither a leader that was
away, nor a loaded, throttled or paused machine, makes a healthy replica look hung; one that is stuck or stopped wants
no processor, and all its time counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.runtime.ids import NodeId
from controlplane.runtime.messages.session import ReplicaLoad


@dataclass(slots=True)
class Stall:
    """Of one replica epoch."""

    progress: int = -1
    # How long the ranks on each node could have moved, in milliseconds of its daemon's life: until now, and until the
    # replica last moved.
    able_ms: dict[NodeId, int] = field(default_factory=dict[NodeId, int])
    moved_ms: dict[NodeId, int] = field(default_factory=dict[NodeId, int])

    def told(self, node: NodeId, load: ReplicaLoad, uptime_ms: int) -> None:
        """A heartbeat of any of its nodes. One that was overtaken says nothing new."""
        able_ms = uptime_ms - load.starved_ms
        self.able_ms[node] = max(able_ms, self.able_ms.get(node, able_ms))
        self.moved_ms.setdefault(node, able_ms)

    def heard(self, load: ReplicaLoad) -> None:
        """How far it is, by rank 0's node."""
        if load.progress != self.progress or load.running + load.waiting == 0:
            self.progress = load.progress
            self.restart()

    def restart(self) -> None:
        """It stands still since now at most."""
        self.moved_ms = dict(self.able_ms)

    @property
    def seconds(self) -> float:
        """Time for which it has not moved though all its ranks could have; a node that is silent lets none pass."""
        return min((ms - self.moved_ms[node] for node, ms in self.able_ms.items()), default=0) / 1000
