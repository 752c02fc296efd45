"""The network between simulated processes: what TCP and gRPC's pings make of a bad one.

A connection keeps its frames in order and loses none while it lives: a lost packet makes its frame late, and all
behind it. Frames of different connections overtake each other. Hosts may be cut off from each other one way or both
ways; frames then wait, as TCP would send them again, until pings end the connection. A connection may break at both
ends, or at one while the other stays open. A killed process's peers hear of it at once, or late; a stopped one's kernel
still accepts connects; a living one's port may refuse. Worse than TCP on purpose: frames may come twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tools.sim.kernel import Kernel
from tools.sim.process import Future, Process

PING_NOTICED_S = (0.8, 1.8)
"""How long until pings without an answer end a connection (PROTOCOL §1, ping timeout of H)."""

EOF_S = (0.001, 0.003)
RESEND_S = 0.2
RESEND_S_MAX = 1.6
"""TCP sends a lost packet again after so long (RFC 6298's least, as Linux has it), then after twice as long."""

WINDOW_FRAMES = 8
"""Frames in flight one way; beyond it a writer waits: the peer's backpressure."""

PROOF_GAP_S = 0.045
"""Between the first and the last of the refused connects that prove a death."""

Accept = Callable[["Side", str], None]


class Refused(Exception):
    """Nobody listens there, or a firewall says so."""


class Side:
    """One end of a connection."""

    __slots__ = (
        "_flying",
        "_held",
        "_last_arrival",
        "_network",
        "_queue",
        "closed",
        "lag",
        "on_closed",
        "on_frame",
        "on_room",
        "peer",
        "process",
    )

    def __init__(self, network: Network, process: Process) -> None:
        self.process = process
        self.closed = False
        # Seconds that each frame from here takes longer: a slow reader at the other end.
        self.lag = 0.0
        self.on_frame: Callable[[Any], None] = _ignore
        self.on_closed: Callable[[], None] = _nothing
        # Called whenever everything written has left.
        self.on_room: Callable[[], None] = _nothing
        self.peer: Side
        self._network = network
        self._queue: deque[Any] = deque()
        self._held: deque[Any] = deque()
        self._flying = 0
        self._last_arrival = 0.0

    @property
    def idle(self) -> bool:
        """Everything written has left."""
        return not self._queue

    def send(self, frame: Any) -> None:
        """Write a frame; one that finds no room in the window waits here."""
        if not self.closed:
            self._queue.append(frame)
            self._pump()

    def close(self) -> None:
        """End the connection after what was written before."""
        if not self.closed:
            self.closed = True
            self._queue.append(_END)
            self._pump()

    def cut(self) -> None:
        """The connection is over as seen from this end: its process hears of it."""
        if not self.closed:
            self.closed = True
            self._queue.clear()
            self._queue.append(_END)
            self._pump()
            self.process.run(self.on_closed)

    def vanish(self) -> None:
        """As `cut`, but the other end is told nothing."""
        if not self.closed:
            self.closed = True
            self._queue.clear()
            self.process.run(self.on_closed)

    def _pump(self) -> None:
        while self._queue and self._flying < WINDOW_FRAMES:
            self._flying += 1
            delay = self._network.delay(self.process.host, self.peer.process.host) + self.lag
            self._last_arrival = max(self._last_arrival, self._network.kernel.now + delay)
            self._network.kernel.at(self._last_arrival, self._arrive, self._queue.popleft())

    def _arrive(self, frame: Any) -> None:
        if self._held or self._network.is_cut(self.process.host, self.peer.process.host):
            self._held.append(frame)
            return
        self._hand_over(frame)

    def release(self) -> None:
        """The way is free again."""
        while self._held and not self._network.is_cut(self.process.host, self.peer.process.host):
            self._hand_over(self._held.popleft())

    def _hand_over(self, frame: Any) -> None:
        if frame is _END:
            self.peer.cut()
            return
        self.peer.process.run(self.peer.deliver, frame)
        if self._network.doubles(self.process.host, self.peer.process.host):
            self.peer.process.run(self.peer.deliver, frame)
        # A stopped reader's window fills up: its room comes back when it reads.
        self.peer.process.run(self._landed)

    def _landed(self) -> None:
        self._flying -= 1
        waited = bool(self._queue)
        self._pump()
        if waited and not self._queue and not self.closed:
            self.process.run(self.on_room)

    def deliver(self, frame: Any) -> None:
        if not self.closed:
            self.on_frame(frame)


class Network:
    """All connections, who listens where, and what is broken at present."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        # (from host, to host) pairs that lose everything.
        self.cuts: set[tuple[str, str]] = set()
        # Addresses whose living process cannot be told from a dead one by a connect.
        self.rejecting: set[str] = set()
        # Seconds added to every frame from or to a host.
        self.slow: dict[str, float] = {}
        # Up to so many seconds more for each frame from or to a host, each its own.
        self.jitter: dict[str, float] = {}
        # Share of the packets from or to a host that are lost, and of frames that come twice.
        self.losing: dict[str, float] = {}
        self.doubling: dict[str, float] = {}
        # Refused connects in a row: who tried, where, and when the first of them was.
        self._refusals: dict[tuple[str, str], float] = {}
        # When a process last had two refused connects in a row, a gap of a probe apart.
        self.proofs: dict[tuple[str, str], float] = {}
        self._listening: dict[str, tuple[Process, Accept]] = {}
        self._sides: list[Side] = []

    def listen(self, address: str, process: Process, accept: Accept) -> None:
        self._listening[address] = process, accept

    def unlisten(self, address: str, process: Process) -> None:
        if address in self._listening and self._listening[address][0] is process:
            del self._listening[address]

    def listener(self, address: str) -> Process | None:
        """The living process behind the address."""
        held = self._listening.get(address)
        return held[0] if held is not None and held[0].alive else None

    def delay(self, source: str, target: str) -> float:
        """Seconds that one frame takes."""
        random = self.kernel.random
        base = random.uniform(0.0002, 0.002) if random.random() < 0.99 else random.uniform(0.002, 0.05)
        if self.slow or self.jitter or self.losing:
            base += self._spoilt(source) + self._spoilt(target)
        return base

    def _spoilt(self, host: str) -> float:
        """Seconds that a frame takes longer for its way through the host."""
        jitter = self.jitter.get(host, 0.0) * self.kernel.random.random()
        return self.slow.get(host, 0.0) + jitter + self._resent(self.losing.get(host, 0.0))

    def _resent(self, lost: float) -> float:
        """Seconds that sending a packet again costs, until it arrives."""
        waited, wait = 0.0, RESEND_S
        while lost and self.kernel.random.random() < lost:
            waited, wait = waited + wait, min(2 * wait, RESEND_S_MAX)
        return waited

    def doubles(self, source: str, target: str) -> bool:
        """The frame that goes from one host to the other comes twice."""
        share = max(self.doubling.get(source, 0.0), self.doubling.get(target, 0.0))
        return share > 0 and self.kernel.random.random() < share

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self.cuts

    # ------------------------------------------------------------ connections

    def dial(self, process: Process, address: str, service: str) -> Future:
        """A connection's near side, once the far process greeted; fails with Refused; never done in a black hole."""
        answer = Future()
        host = address.partition(":")[0]
        self.kernel.after(self.delay(process.host, host), self._knock, process, address, service, answer)
        return answer

    def _knock(self, process: Process, address: str, service: str, answer: Future) -> None:
        host = address.partition(":")[0]
        if self.is_cut(process.host, host) or self.is_cut(host, process.host):
            return
        back = self.delay(host, process.host)
        held = self._listening.get(address)
        if held is None or not held[0].alive or address in self.rejecting:
            self.kernel.after(back, process.run, lambda: answer.fail(Refused(address)))
            return
        server, accept = held
        server.run(self._accept, server, accept, process, service, answer)

    def _accept(self, server: Process, accept: Accept, client: Process, service: str, answer: Future) -> None:
        if not client.alive:
            return
        near, far = Side(self, client), Side(self, server)
        near.peer, far.peer = far, near
        self._sides = [side for side in self._sides if not (side.closed and side.peer.closed)]
        self._sides += (near, far)
        accept(far, service)
        self.kernel.after(self.delay(server.host, client.host), client.run, answer.set, near)

    def probe(self, process: Process, address: str) -> Future:
        """One raw connect: True if it was refused. Never done in a black hole."""
        answer = Future()
        host = address.partition(":")[0]
        self.kernel.after(self.delay(process.host, host), self._probe, process, address, answer)
        return answer

    def _probe(self, process: Process, address: str, answer: Future) -> None:
        host = address.partition(":")[0]
        if self.is_cut(process.host, host) or self.is_cut(host, process.host):
            return
        refused = self.listener(address) is None or address in self.rejecting
        self.kernel.after(self.delay(host, process.host), process.run, self._probed, process, address, refused, answer)

    def _probed(self, process: Process, address: str, refused: bool, answer: Future) -> None:
        key = (process.name, address)
        if not refused:
            self._refusals.pop(key, None)
        elif self.kernel.now - self._refusals.setdefault(key, self.kernel.now) >= PROOF_GAP_S:
            self.proofs[key] = self.kernel.now
        answer.set(refused)

    # ------------------------------------------------------------ faults

    def killed(self, process: Process, eof_after: float | None) -> None:
        """Its kernel says so to every peer, unless the whole machine went (None): then only pings do."""
        for side in self.sides_of(process):
            if eof_after is None:
                self._doubt(side.peer)
            elif not side.closed:
                delay = eof_after or self.kernel.random.uniform(*EOF_S)
                self.kernel.after(delay, side.close)
        for address, (listener, _) in list(self._listening.items()):
            if listener is process:
                del self._listening[address]

    def stopped(self, process: Process) -> None:
        """Peers of a stopped process hear no pings."""
        for side in self.sides_of(process):
            self._doubt(side.peer)

    def cut(self, source: str, target: str) -> None:
        """Nothing goes from `source` to `target` any more."""
        self.cuts.add((source, target))
        for side in self._sides:
            if {side.process.host, side.peer.process.host} == {source, target}:
                self._doubt(side)

    def heal(self, source: str, target: str) -> None:
        self.cuts.discard((source, target))
        for side in list(self._sides):
            side.release()

    def heal_all(self) -> None:
        for source, target in list(self.cuts):
            self.heal(source, target)
        for spoilt in (self.rejecting, self.slow, self.jitter, self.losing, self.doubling):
            spoilt.clear()
        for side in self._sides:
            side.lag = 0.0

    def break_connections(self, process: Process) -> None:
        """Every connection of the process ends under living peers."""
        for side in self.sides_of(process):
            side.cut()
            side.peer.cut()

    def break_half(self, process: Process) -> None:
        """Every connection of the process ends at its end alone; pings of the other ends stay without an answer."""
        for side in self.sides_of(process):
            if not side.closed:
                side.vanish()
                self._doubt(side.peer)

    def sides_of(self, process: Process) -> list[Side]:
        """This end of every connection of the process."""
        return [side for side in self._sides if side.process is process]

    def _doubt(self, side: Side) -> None:
        """Pings of this side will stay without an answer, if it lasts."""
        self.kernel.after(self.kernel.random.uniform(*PING_NOTICED_S), self._judge, side)

    def _judge(self, side: Side) -> None:
        here, there = side.process, side.peer.process
        mute = there.mute or side.peer.closed
        if mute or self.is_cut(here.host, there.host) or self.is_cut(there.host, here.host):
            side.cut()


_END = object()


def _ignore(frame: Any) -> None:
    pass


def _nothing() -> None:
    pass
