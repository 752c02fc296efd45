"""What each kind of fault does to the world, and how it ends. A method a kind, `do_KIND`; striking.py calls them."""

from __future__ import annotations

from collections.abc import Callable

from controlplane.core.messages import DrainAsked, UndrainAsked
from controlplane.runtime.ids import NodeId
from tools.sim.etcd import HOST
from tools.sim.faults import Fault
from tools.sim.ranks import SimRank
from tools.sim.world import World

Ends = Callable[[], None] | None


class _Strikes:
    def __init__(self, world: World) -> None:
        self._world = world


class Processes(_Strikes):
    """Control planes and daemons."""

    def do_kill(self, name: str, fault: Fault) -> Ends:
        self._world.kill(name)
        return lambda: self._world.restart(name)

    def do_kill_late(self, name: str, fault: Fault) -> Ends:
        self._world.kill(name, eof_after=fault.value)
        return lambda: self._world.restart(name)

    def do_lose_machine(self, name: str, fault: Fault) -> Ends:
        self._world.kill(name, eof_after=None)
        return lambda: self._world.restart(name)

    def do_stop(self, name: str, fault: Fault) -> Ends:
        self._world.stop(name)
        return lambda: self._world.go_on(name)

    def do_pause(self, name: str, fault: Fault) -> Ends:
        """Its machine stands still, ranks and all."""
        self._world.pause([name])
        return lambda: self._world.unpause([name])

    def do_pause_all(self, target: str, fault: Fault) -> Ends:
        """All machines but etcd's, which lets every lease expire."""
        self._world.pause(self._world.hosts())
        return lambda: self._world.unpause(self._world.hosts())

    def do_hang(self, name: str, fault: Fault) -> Ends:
        self._world.stop(name, hung=True)
        return lambda: self._world.go_on(name)

    def do_jump(self, name: str, fault: Fault) -> Ends:
        process = self._world.process(name)
        if process is not None:
            process.jump(fault.value)
        return None

    def do_leave(self, name: str, fault: Fault) -> Ends:
        """An operator's SIGTERM."""
        self._world.leave(name)
        return lambda: self._world.restart(name)


class Wires(_Strikes):
    """The network."""

    def do_cut(self, target: str, fault: Fault) -> Ends:
        one_way = ">" in target
        one, other = target.split(">" if one_way else "-")
        return self._cut_pairs([(one, other)] if one_way else [(one, other), (other, one)])

    def do_cut_etcd(self, name: str, fault: Fault) -> Ends:
        return self._cut_pairs([(name, HOST), (HOST, name)])

    def do_isolate(self, name: str, fault: Fault) -> Ends:
        """From all but etcd."""
        return self._cut_off(name, self._world.hosts())

    def do_unplug(self, name: str, fault: Fault) -> Ends:
        """From all."""
        return self._cut_off(name, [*self._world.hosts(), HOST])

    def _cut_off(self, name: str, hosts: list[str]) -> Ends:
        return self._cut_pairs([pair for other in hosts if other != name for pair in ((name, other), (other, name))])

    def _cut_pairs(self, pairs: list[tuple[str, str]]) -> Ends:
        for source, target in pairs:
            self._world.network.cut(source, target)

        def heal() -> None:
            for source, target in pairs:
                self._world.network.heal(source, target)

        return heal

    def do_break(self, name: str, fault: Fault) -> Ends:
        process = self._world.process(name)
        if process is not None:
            self._world.network.break_connections(process)
        return None

    def do_break_half(self, name: str, fault: Fault) -> Ends:
        """Its ends of all connections are over; the other ends stay open until their pings miss an answer."""
        process = self._world.process(name)
        if process is not None:
            self._world.network.break_half(process)
        return None

    def do_slow(self, name: str, fault: Fault) -> Ends:
        """Every frame from it and to it takes longer."""
        return self._spoil(self._world.network.slow, name, fault)

    def do_lose(self, name: str, fault: Fault) -> Ends:
        """Packets are lost, and sent again."""
        return self._spoil(self._world.network.losing, name, fault)

    def do_double(self, name: str, fault: Fault) -> Ends:
        """Frames come twice."""
        return self._spoil(self._world.network.doubling, name, fault)

    def do_jitter(self, name: str, fault: Fault) -> Ends:
        """Each frame takes a time of its own: what goes over one connection overtakes what goes over another."""
        return self._spoil(self._world.network.jitter, name, fault)

    def _spoil(self, what: dict[str, float], name: str, fault: Fault) -> Ends:
        what[name] = fault.value

        def heal() -> None:
            what.pop(name, None)

        return heal

    def do_lag(self, name: str, fault: Fault) -> Ends:
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

    def do_reject(self, name: str, fault: Fault) -> Ends:
        addresses = {f"{name}:1", f"{name}:2"}
        self._world.network.rejecting |= addresses
        return lambda: self._world.network.rejecting.difference_update(addresses)

    def do_reject_break(self, name: str, fault: Fault) -> Ends:
        """For less than the gap between two connects of a probe."""
        ends = self.do_reject(name, fault)
        self.do_break(name, fault)
        return ends


class Store(_Strikes):
    """etcd."""

    def do_etcd_down(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.go_down()
        return self._world.etcd.come_up

    def do_etcd_election(self, target: str, fault: Fault) -> Ends:
        """Its members have no leader: nothing is answered, no lease expires, watches stay and are silent."""
        self._world.etcd.begin_election()
        return self._world.etcd.end_election

    def do_etcd_fail(self, target: str, fault: Fault) -> Ends:
        """Some calls fail; whether they were carried out nobody is told."""
        self._world.etcd.failing = fault.value

        def heal() -> None:
            self._world.etcd.failing = 0.0

        return heal

    def do_etcd_slow(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.delay_s = fault.value

        def heal() -> None:
            self._world.etcd.delay_s = 0.0

        return heal

    def do_etcd_read_only(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.read_only = True

        def heal() -> None:
            self._world.etcd.read_only = False

        return heal

    def do_etcd_snapshot(self, target: str, fault: Fault) -> Ends:
        self._world.snapshots.append(self._world.etcd.snapshot())
        return None

    def do_etcd_restore(self, target: str, fault: Fault) -> Ends:
        if self._world.snapshots:
            self._world.etcd.restore(self._world.snapshots[-1])
        return None

    def do_etcd_compact(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.compact()
        return None

    def do_etcd_drop_watches(self, target: str, fault: Fault) -> Ends:
        self._world.etcd.drop_watches()
        return None

    def do_revoke_lease(self, name: str, fault: Fault) -> Ends:
        """By an operator's mistake."""
        content = self._world.etcd.content
        held = [item.lease for key, item in content.keys.items() if key.endswith(f"/{name}") and item.lease]
        for lease in held:
            self._world.etcd.revoke(lease)
        return None


class Devices(_Strikes):
    """Rank processes."""

    def _rank(self, target: str) -> SimRank | None:
        name, _, device = target.partition("/")
        return self._world.workers[name].rank_on(device)

    def do_rank_kill(self, target: str, fault: Fault) -> Ends:
        if (rank := self._rank(target)) is not None:
            rank.die(signal=9, release_after=fault.value)
        return None

    def do_rank_crash(self, target: str, fault: Fault) -> Ends:
        if (rank := self._rank(target)) is not None:
            rank.die(code=1, release_after=fault.value)
        return None

    def do_rank_stop(self, target: str, fault: Fault) -> Ends:
        rank = self._rank(target)
        if rank is None:
            return None
        rank.stop()
        rank.hangs()

        def go_on() -> None:
            if rank.alive:
                rank.go_on()
                rank.hangs_no_more()

        return go_on

    def do_rank_stick(self, target: str, fault: Fault) -> Ends:
        rank = self._rank(target)
        if rank is None:
            return None
        rank.stuck = True
        rank.hangs()

        def heal() -> None:
            rank.stuck = False
            rank.hangs_no_more()

        return heal

    def do_rank_slow(self, target: str, fault: Fault) -> Ends:
        rank = self._rank(target)
        if rank is None:
            return None
        rank.slow = fault.value

        def heal() -> None:
            rank.slow = 1.0

        return heal

    def do_rank_late(self, target: str, fault: Fault) -> Ends:
        """Its answers come late, in order: often when nobody waits for them any more."""
        rank = self._rank(target)
        if rank is None:
            return None
        rank.late = fault.value

        def heal() -> None:
            rank.late = 0.0

        return heal

    def do_rank_lie(self, target: str, fault: Fault) -> Ends:
        """It says what is not so, or what it said before."""
        rank = self._rank(target)
        if rank is not None and rank.runs:
            self._world.kernel.tell(rank.name, "lies", frame=rank.lie())
        return None

    def do_forks_fail(self, target: str, fault: Fault) -> Ends:
        self._world.house.forks_fail = True

        def heal() -> None:
            self._world.house.forks_fail = False

        return heal


class People(_Strikes):
    """Operators and clients."""

    def do_drain(self, name: str, fault: Fault) -> Ends:
        node = NodeId(name)
        self._world.ask_leader(DrainAsked(node, deadline_ms=round(fault.lasts * 500)))
        return lambda: self._world.ask_leader(UndrainAsked(node))

    def do_scale(self, target: str, fault: Fault) -> Ends:
        self._world.scale(int(fault.value))
        return None

    def do_respec(self, target: str, fault: Fault) -> Ends:
        """A new spec: every replica is replaced, one after the other."""
        self._world.respec(int(fault.value))
        return None

    def do_poison(self, target: str, fault: Fault) -> Ends:
        gateways = self._world.gateways()
        if gateways:
            self._world.crowd.make(self._world.kernel.random.choice(gateways), poison=True)
        return None

    def do_burst(self, target: str, fault: Fault) -> Ends:
        gateways = self._world.gateways()
        for _ in range(int(fault.value) if gateways else 0):
            self._world.crowd.make(self._world.kernel.random.choice(gateways))
        return None
