"""Order of the requests that wait for a replica of one deployment.

By priority (higher first), then replays before new ones, then tenants in turn, then age. Every operation is O(1) in the
number of waiting requests but for the number of distinct (priority, replay) classes, which stays small.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from controlplane.runtime.ids import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A request's place in line."""

    request: RequestId
    priority: int
    # A replay was admitted once already: it bypasses the bound and goes before new work of its priority.
    replay: bool
    tenant: str


_Class = tuple[int, bool]
_Line = OrderedDict[RequestId, Ticket]


class FairQueue:
    """Tickets in fair order. One ticket a request."""

    def __init__(self) -> None:
        self._tickets: dict[RequestId, Ticket] = {}
        # Per class its tenants in turn, per tenant its tickets by age.
        self._classes: dict[_Class, OrderedDict[str, _Line]] = {}
        self._new = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._tickets

    def __iter__(self) -> Iterator[RequestId]:
        return iter(self._tickets)

    @property
    def new(self) -> int:
        """Tickets that are no replays: what the bound counts."""
        return self._new

    def push(self, ticket: Ticket) -> None:
        """Stand in line behind those of the same class and tenant."""
        assert ticket.request not in self._tickets, f"{ticket.request} is queued twice"
        self._enter(ticket)

    def discard(self, request: RequestId) -> bool:
        """Leave the line. False if the request does not stand in it."""
        ticket = self._tickets.pop(request, None)
        if ticket is None:
            return False
        self._new -= not ticket.replay
        tenants = self._classes[_class_of(ticket)]
        line = tenants[ticket.tenant]
        del line[request]
        if not line:
            del tenants[ticket.tenant]
        if not tenants:
            del self._classes[_class_of(ticket)]
        return True

    def take(self, limit: int) -> list[Ticket]:
        """Remove the first `limit` tickets; each one taken sends its tenant to the end of the turn."""
        taken: list[Ticket] = []
        while self._classes and len(taken) < limit:
            best = min(self._classes, key=_class_order)
            tenants = self._classes[best]
            tenant, line = next(iter(tenants.items()))
            ticket = next(iter(line.values()))
            tenants.move_to_end(tenant)
            self.discard(ticket.request)
            taken.append(ticket)
        return taken

    def restore(self, tickets: Sequence[Ticket]) -> None:
        """Give back tickets of one `take`, in its order: they stand in front again, and their tenants too."""
        for ticket in reversed(tickets):
            self._enter(ticket)
            tenants = self._classes[_class_of(ticket)]
            tenants[ticket.tenant].move_to_end(ticket.request, last=False)
            tenants.move_to_end(ticket.tenant, last=False)

    def discard_all(self, requests: Iterable[RequestId]) -> None:
        for request in requests:
            self.discard(request)

    def _enter(self, ticket: Ticket) -> None:
        self._tickets[ticket.request] = ticket
        self._new += not ticket.replay
        tenants = self._classes.setdefault(_class_of(ticket), OrderedDict())
        tenants.setdefault(ticket.tenant, OrderedDict())[ticket.request] = ticket


def _class_of(ticket: Ticket) -> _Class:
    return ticket.priority, ticket.replay


def _class_order(key: _Class) -> tuple[int, bool]:
    priority, replay = key
    return -priority, not replay
