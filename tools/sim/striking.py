"""Carries a schedule out: when each fault strikes, what it finds under way, and how it ends."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable

from tools.sim.faults import Fault
from tools.sim.situation import under_way
from tools.sim.strikes import Devices, People, Processes, Store, Wires
from tools.sim.world import World


class Striker:
    """Strikes the world by a schedule."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.struck = 0
        # Faults that struck while that was under way.
        self.during: Counter[str] = Counter()
        self._arms = (Processes(world), Wires(world), Store(world), Devices(world), People(world))
        self._awaited: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._over = False

    def plan(self, faults: list[Fault]) -> None:
        self._world.kernel.on_told = self._told
        for fault in faults:
            self._world.kernel.at(fault.at, self._await if fault.upon else self._strike, fault)

    def stop(self) -> None:
        """Nothing more strikes."""
        self._over = True

    def _await(self, fault: Fault) -> None:
        self._awaited[fault.upon].append(fault)

    def _told(self, event: str) -> None:
        """One fault for each event that some wait for."""
        if self._awaited.get(event):
            fault = self._awaited[event].popleft()
            self._world.kernel.after(fault.delay, self._strike, fault)

    def _strike(self, fault: Fault) -> None:
        if self._over:
            return
        target = fault.target
        if target == "leader":
            leader = self._world.leader()
            if leader is None:
                return
            target = leader.name
        self.struck += 1
        self.during.update(under_way(self._world))
        self._world.kernel.tell("fault", fault.kind, target=target, value=fault.value or "", lasts=fault.lasts or "")
        ends = self._method(fault.kind)(target, fault)
        if ends is not None:
            self._world.kernel.after(fault.lasts, self._end, ends)

    def _method(self, kind: str) -> Callable[[str, Fault], Callable[[], None] | None]:
        return next(method for arm in self._arms if (method := getattr(arm, f"do_{kind}", None)) is not None)

    def _end(self, ends: Callable[[], None]) -> None:
        if not self._over:
            ends()
