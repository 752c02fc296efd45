"""How each kind of fault strikes the world, and how it ends."""

from __future__ import annotations

from collections.abc import Callable

from controlplane.core.messages import DrainAsked, UndrainAsked
from controlplane.runtime.ids import Epoch, NodeId
from dataplane import frames
from tools.sim.etcd import HOST
from tools.sim.faults import Fault
from tools.sim.ranks import SimRank
from tools.sim.world import World

Ends = Callable[[], None] | None


class Striker:
    """Carries a schedule out."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.struck = 0
        self._over = False

    def plan(self, faults: list[Fault]) -> None:
        for fault in faults:
            self._world.kernel.at(fault.at, self._strike, fault)

    def stop(self) -> None:
        """Nothing more strikes."""
        self._over = True

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
        self._world.kernel.tell("fault", fault.kind, target=target, value=fault.value or "", lasts=fault.lasts or "")
        ends = getattr(self, f"_{fault.kind}")(target, fault)
        if ends is not None:
            self._world.kernel.after(fault.lasts, self._end, ends)

    def _end(self, ends: Callable[[], None]) -> None:
        if not self._over:
            ends()

    # ------------------------------------------------------------ processes

    def _kill(self, name: str, fault: Fault) -> Ends:
        self._world.kill(name)
        return lambda: self._world.restart(name)

    def _kill_late(self, name: str, fault: Fault) -> Ends:
        self._world.kill(name, eof_after=fault.value)
        return lambda: self._world.restart(name)

    def _lose_machine(self, name: str, fault: Fault) -> Ends:
        self._world.kill(name, eof_after=None)
        return lambda: self._world.restart(name)

    def _stop(self, name: str, fault: Fault) -> Ends:
        self._world.stop(name)
        return lambda: self._world.go_on(name)

    def _hang(self, name: str, fault: Fault) -> Ends:
        self._world.stop(name, hung=True)
        return lambda: self._world.go_on(name)

    def _jump(self, name: str, fault: Fault) -> Ends:
        process = self._world.process(name)
        if process is not None:
            process.jump(fault.value)
        return None

    def _leave(self, name: str, fault: Fault) -> Ends:
        worker = self._world.workers[name]
        if worker.process.alive:
            worker.process.run(worker.stop)
        return lambda: self._world.restart(name)

    # ------------------------------------------------------------ the network

    def _cut(self, target: str, fault: Fault) -> Ends:
        one_way = ">" in target
        one, other = target.split(">" if one_way else "-")
        return self._cut_pairs([(one, other)] if one_way else [(one, other), (other, one)])

    def _cut_etcd(self, name: str, fault: Fault) -> Ends:
        return self._cut_pairs([(name, HOST), (HOST, name)])

    def _isolate(self, name: str, fault: Fault) -> Ends:
        """From all but etcd."""
        others = [other for other in self._world.hosts() if other != name]
        return self._cut_pairs([pair for other in others for pair in ((name, other), (other, name))])

    def _cut_pairs(self, pairs: list[tuple[str, str]]) -> Ends:
        for source, target in pairs:
            self._world.network.cut(source, target)

        def heal() -> None:
            for source, target in pairs:
                self._world.network.heal(source, target)

        return heal

    def _break(self, name: str, fault: Fault) -> Ends:
        process = self._world.process(name)
        if process is not None:
            self._world.network.break_connections(process)
        return None

    def _slow(self, name: str, fault: Fault) -> Ends:
        self._world.network.slow[name] = fault.value

        def heal() -> None:
            self._world.network.slow.pop(name, None)

        return heal

    def _lag(self, name: str, fault: Fault) -> Ends:
        """Whoever it writes to reads slowly: its windows fill up."""
        process = self._world.process(name)
        if process is None:
            return None
        sides = self._world.network.sides_of(process)
        for side in sides:
            side.lag = fault.value

        def heal() -> None:
            for side in sides:
                side.lag = 0.0

        return heal

    def _reject(self, name: str, fault: Fault) -> Ends:
        addresses = {f"{name}:1", f"{name}:2"}
        self._world.network.rejecting |= addresses
        return lambda: self._world.network.rejecting.difference_update(addresses)

    def _reject_break(self, name: str, fault: Fault) -> Ends:
        """For less than the gap between two connects of a probe."""
        ends = self._reject(name, fault)
        self._break(name, fault)
        return ends

    # ------------------------------------------------------------ etcd

    def _etcd_down(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.go_down()
        return self._world.etcd.come_up

    def _etcd_slow(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.delay_s = fault.value

        def heal() -> None:
            self._world.etcd.delay_s = 0.0

        return heal

    def _etcd_read_only(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.read_only = True

        def heal() -> None:
            self._world.etcd.read_only = False

        return heal

    def _etcd_snapshot(self, target: str, fault: Fault) -> Ends:
        self._world.snapshots.append(self._world.etcd.snapshot())
        return None

    def _etcd_restore(self, target: str, fault: Fault) -> Ends:
        if self._world.snapshots:
            self._world.etcd.restore(self._world.snapshots[-1])
        return None

    def _etcd_compact(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.compact()
        return None

    def _etcd_drop_watches(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.drop_watches()
        return None

    def _revoke_lease(self, name: str, fault: Fault) -> Ends:
        """By an operator's mistake."""
        content = self._world.etcd.content
        held = [item.lease for key, item in content.keys.items() if key.endswith(f"/{name}") and item.lease]
        for lease in held:
            self._world.etcd.revoke(lease)
        return None

    # ------------------------------------------------------------ ranks

    def _rank(self, target: str) -> SimRank | None:
        name, _, device = target.partition("/")
        return self._world.workers[name].rank_on(device)

    def _rank_kill(self, target: str, fault: Fault) -> Ends:
        if (rank := self._rank(target)) is not None:
            rank.die(signal=9, release_after=fault.value)
        return None

    def _rank_crash(self, target: str, fault: Fault) -> Ends:
        if (rank := self._rank(target)) is not None:
            rank.die(code=1, release_after=fault.value)
        return None

    def _rank_stop(self, target: str, fault: Fault) -> Ends:
        rank = self._rank(target)
        if rank is None:
            return None
        rank.stop()
        return lambda: rank.go_on() if rank.alive else None

    def _rank_stick(self, target: str, fault: Fault) -> Ends:
        rank = self._rank(target)
        if rank is None:
            return None
        rank.stuck = True

        def heal() -> None:
            rank.stuck = False

        return heal

    def _rank_slow(self, target: str, fault: Fault) -> Ends:
        rank = self._rank(target)
        if rank is None:
            return None
        rank.slow = fault.value

        def heal() -> None:
            rank.slow = 1.0

        return heal

    def _rank_lie(self, target: str, fault: Fault) -> Ends:
        """It answers what nobody asked, for an epoch that is over and for the present one."""
        rank = self._rank(target)
        if rank is not None and rank.runs:
            epoch = max(rank.epoch, Epoch(1))
            rank.say(frames.Formed(Epoch(epoch - 1)))
            rank.say(frames.Formed(epoch))
        return None

    def _forks_fail(self, target: str, fault: Fault) -> Ends:
        self._world.house.forks_fail = True

        def heal() -> None:
            self._world.house.forks_fail = False

        return heal

    # ------------------------------------------------------------ operators and clients

    def _drain(self, name: str, fault: Fault) -> Ends:
        node = NodeId(name)
        self._world.ask_leader(DrainAsked(node, deadline_ms=round(fault.lasts * 500)))
        return lambda: self._world.ask_leader(UndrainAsked(node))

    def _scale(self, target: str, fault: Fault) -> Ends:
        self._world.scale(int(fault.value))
        return None

    def _poison(self, target: str, fault: Fault) -> Ends:
        gateways = self._world.gateways()
        if gateways:
            self._world.crowd.make(self._world.kernel.random.choice(gateways), poison=True)
        return None

    def _burst(self, target: str, fault: Fault) -> Ends:
        gateways = self._world.gateways()
        for _ in range(int(fault.value) if gateways else 0):
            self._world.crowd.make(self._world.kernel.random.choice(gateways))
        return None
