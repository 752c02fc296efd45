"""A named group of ranks and the exchanges of tensors its members make.

Every exchange has a deadline, is counted and timed, moves the rank's progress page, and can be ended from another
thread. What goes wrong in it is a PeerLost that names the group and the exchange. gloo and NCCL through the same code;
small tensors of ranks on one host through memory that they share. No global default group: a process forms as many
groups, one epoch after another, as it likes.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d

from controlplane.runtime.errors import PeerLost
from controlplane.runtime.messages.common import Reason, ReasonKind
from dataplane.parallel.device_board import DeviceBoard
from dataplane.parallel.shared_memory import Board, BoardAborted, BoardTimeout, fits
from dataplane.parallel.sockets import Connections
from dataplane.progress import ProgressPage

dist: Any = _distributed_c10d
"""Its C++ bindings have no types."""

SUM, MEAN, MAX, MIN = "sum", "mean", "max", "min"

_GLOO_OPERATIONS = {
    SUM: dist.ReduceOp.SUM,
    MEAN: dist.ReduceOp.SUM,
    MAX: dist.ReduceOp.MAX,
    MIN: dist.ReduceOp.MIN,
}
_BOARD_OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # Of two parts an addition rounds like the sum, in a third of its time in half precision.
    SUM: lambda parts: parts[0] + parts[1] if len(parts) == 2 else parts.sum(0, dtype=parts.dtype),
    MEAN: lambda parts: parts.mean(0),
    MAX: lambda parts: parts.amax(0),
    MIN: lambda parts: parts.amin(0),
}


@dataclass(slots=True)
class Cost:
    """What one kind of exchange has cost in a group."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Pulse:
    """Tells the daemon that this rank moves, and how many exchanges it has entered in its epoch."""

    page: ProgressPage | None = None
    entered: int = 0

    def enter(self) -> int:
        self.entered += 1
        if self.page is not None:
            self.page.set_collective(self.entered)
        return self.entered

    def leave(self) -> None:
        if self.page is not None:
            self.page.advance()


@dataclass(slots=True)
class Transport:
    """The connections of a group of more than one rank."""

    backend: Any
    timeout_s: float
    connections: Connections | None = None
    board: Board | None = None
    device_board: DeviceBoard | None = None


@dataclass(slots=True)
class Group:
    """Ranks that exchange tensors, known by their index in `ranks`. Of one rank, every exchange is the identity.

    All members must make the same exchanges in the same order, from one thread. Tensors on the meta device pass
    through.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    transport: Transport | None = None
    pulse: Pulse = field(default_factory=Pulse)
    costs: dict[str, Cost] = field(default_factory=dict)
    # Sums that gloo or NCCL made, not a board.
    over_backend: int = 0
    _aborted: threading.Event = field(default_factory=threading.Event)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def device(self) -> str:
        """Where tensors must lie to be exchanged."""
        over_nccl = self.transport is not None and not isinstance(self.transport.backend, dist.ProcessGroupGloo)
        return "cuda" if over_nccl else "cpu"

    def all_reduce(self, x: Tensor, operation: str = SUM) -> Tensor:
        """The combined `x` on every rank, with the same bits everywhere. May reuse the memory of `x`."""
        if self._alone(x):
            return x
        with self._exchange("all_reduce", x) as transport:
            if transport.board is not None and fits(x):
                return _BOARD_OPERATIONS[operation](transport.board.gather(x, self._deadline(None)))
            x = x.contiguous()
            if transport.device_board is not None and operation == SUM and transport.device_board.fits(x):
                return transport.device_board.sum(x)
            self._launch_all_reduce(transport, x, operation).wait()
            return x / self.size if operation == MEAN else x

    def begin_sum(self, x: Tensor) -> UnderWay:
        """The sum of every rank's `x` (contiguous) into the memory of `x`, beside what comes after this call: on a GPU
        beside the kernels launched then. `x` is the sum once `UnderWay.wait` has returned. All ranks wait for their
        sums in the order in which they began them."""
        assert x.is_contiguous()
        with self._exchange("all_reduce", x) as transport:
            return UnderWay(self, "all_reduce", self._launch_all_reduce(transport, x, SUM), x)

    def _launch_all_reduce(self, transport: Transport, x: Tensor, operation: str) -> Any:
        self.over_backend += 1
        options = dist.AllreduceOptions()
        options.reduceOp = _GLOO_OPERATIONS[operation]
        options.timeout = timedelta(seconds=transport.timeout_s)
        return transport.backend.allreduce([x], options)

    def reduce(self, x: Tensor, to: int, operation: str = SUM) -> Tensor:
        """The combined `x` on member `to`; elsewhere the result has no meaning. May reuse the memory of `x`."""
        if self._alone(x):
            return x
        with self._exchange("reduce", x) as transport:
            x = x.contiguous()
            options = dist.ReduceOptions()
            options.reduceOp = _GLOO_OPERATIONS[operation]
            options.rootRank = to
            options.timeout = timedelta(seconds=transport.timeout_s)
            transport.backend.reduce([x], options).wait()
            return x / self.size if operation == MEAN else x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every member's `x` (all of one shape), (size, *x.shape), in order of members."""
        if self._alone(x):
            return x.unsqueeze(0) if self.size == 1 else x.new_empty(self.size, *x.shape)
        with self._exchange("all_gather", x) as transport:
            if transport.board is not None and fits(x):
                return transport.board.gather(x, self._deadline(None)).clone()
            parts = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
            options = dist.AllgatherOptions()
            options.timeout = timedelta(seconds=transport.timeout_s)
            transport.backend._allgather_base(parts.view(-1), x.reshape(-1), options).wait()
            return parts

    def broadcast(self, x: Tensor, source: int, timeout_s: float | None = None, patient: bool = False) -> Tensor:
        """Fill `x` (contiguous) with member `source`'s. `patient`: wait without a deadline, as an idle rank does."""
        if self._alone(x):
            return x
        assert x.is_contiguous()
        with self._exchange("broadcast", x, idle=patient) as transport:
            if transport.board is not None and fits(x):
                transport.board.broadcast(x, source, None if patient else self._deadline(timeout_s))
                return x
            options = dist.BroadcastOptions()
            options.rootRank = source
            options.timeout = timedelta(seconds=_PATIENT_S if patient else timeout_s or transport.timeout_s)
            transport.backend.broadcast([x], options).wait()
            return x

    def send(self, x: Tensor, to: int) -> UnderWay:
        """Send `x` to member `to` without waiting for it to arrive. Keep the result until `UnderWay.wait`: then the
        memory may be reused."""
        x = x.contiguous()
        with self._exchange("send", x) as transport:
            return UnderWay(self, "send", transport.backend.send([x], to, 0), x)

    def receive(self, x: Tensor, source: int) -> Tensor:
        """Fill `x` (contiguous) with what member `source` sent."""
        assert x.is_contiguous()
        with self._exchange("receive", x) as transport:
            transport.backend.recv([x], source, 0).wait()
            return x

    def all_to_all(self, x: Tensor, counts: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send `counts[i]` rows of `x`, in order, to member i; get `received[i]` rows from each, in their order."""
        if self._alone(x):
            return x
        with self._exchange("all_to_all", x) as transport:
            result = torch.empty(sum(received), *x.shape[1:], dtype=x.dtype, device=x.device)
            options = dist.AllToAllOptions()
            options.timeout = timedelta(seconds=transport.timeout_s)
            transport.backend.alltoall_base(result, x.contiguous(), list(received), list(counts), options).wait()
            return result

    def barrier(self) -> None:
        """Return once every member has come."""
        if self.size > 1:
            self.all_reduce(torch.zeros(1, device=self.device))

    def end_waits(self) -> None:
        """First part of an abort, which waits for nothing: whoever waits in an exchange, here or elsewhere, gets a
        PeerLost. From any thread."""
        self._aborted.set()
        if self.transport is None:
            return
        if self.transport.board is not None:
            self.transport.board.abort()
        if self.transport.device_board is not None:
            self.transport.device_board.abort()
        if self.transport.connections is not None:
            self.transport.connections.shutdown()

    def abort_backend(self) -> None:
        """Second part of an abort: it frees memory of a GPU, and so waits until whatever runs there has ended."""
        if self.transport is not None and self.device == "cuda":
            self.transport.backend.abort()

    def check(self) -> None:
        """Raise PeerLost if the group was aborted. To be asked before results of a GPU are believed: an abort ends the
        kernels of an exchange, and what they leave is of no meaning."""
        if self._aborted.is_set():
            raise self.lost(self.pulse.entered, "aborted")

    def close(self) -> None:
        """Let go of connections and memory, after the last exchange or an abort."""
        self._aborted.set()
        if self.transport is not None and self.transport.connections is not None:
            self.transport.connections.close()
        self.transport = None

    def _alone(self, x: Tensor) -> bool:
        return self.size == 1 or x.is_meta

    def _deadline(self, timeout_s: float | None) -> float:
        assert self.transport is not None
        return time.monotonic() + (timeout_s or self.transport.timeout_s)

    @contextmanager
    def _exchange(self, kind: str, x: Tensor, idle: bool = False) -> Iterator[Transport]:
        """`idle`: what it takes is waiting for work, and no cost."""
        number = self.pulse.enter()
        transport = self.transport
        if transport is None or self._aborted.is_set():
            raise self.lost(number, f"{kind} in an aborted group")
        begun = time.perf_counter()
        try:
            yield transport
        except BoardTimeout as error:
            late = ", ".join(str(self.ranks[index]) for index in error.missing)
            raise self.lost(number, f"{kind}: rank {late} did not come in time") from error
        except (RuntimeError, BoardAborted) as error:
            raise self.lost(number, f"{kind}: {'aborted' if self._aborted.is_set() else _said(error)}") from error
        cost = self.costs.setdefault(kind, Cost())
        cost.calls += 1
        cost.bytes += x.numel() * x.element_size()
        cost.seconds += 0.0 if idle else time.perf_counter() - begun
        self.pulse.leave()

    def lost(self, number: int, text: str) -> PeerLost:
        """The error of an exchange that could not be made."""
        return PeerLost(Reason(kind=ReasonKind.GROUP_FAILED, text=text, group=self.name, collective=number))


def _said(error: Exception) -> str:
    """What a backend says, without the place in its source where it says so, and its advice."""
    return _PLACE.sub("", str(error)).partition(_ADVICE)[0]


_ADVICE = ". This is typically"
_PLACE = re.compile(r"^\[\S+:\d+\] ")
_PATIENT_S = 365 * 24 * 3600.0
"""gloo knows no wait without an end; an abort ends this one."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """An exchange that was begun. Holds its memory."""

    group: Group
    kind: str
    work: Any
    x: Tensor

    def wait(self) -> None:
        """Return once it is over; on a GPU, once whatever is launched from now on comes after it. Raises PeerLost."""
        try:
            self.work.wait()
        except RuntimeError as error:
            raise self.group.lost(self.group.pulse.entered, f"{self.kind}: {error}") from error
