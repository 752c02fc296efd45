"""The five kinds of error. Foreign exceptions become one of them once, at the boundary, with their cause kept.

The fifth kind, a broken invariant, is an `assert`: it ends its actor and lets supervision act.
"""

from __future__ import annotations

from controlplane.runtime.messages.common import Reason, ReasonKind


class PerdureError(Exception):
    """Base of the four kinds that carry a reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.text or reason.kind.name.lower())
        self.reason = reason


class Rejected(PerdureError):
    """The caller's fault: repeating it changes nothing."""


class Retryable(PerdureError):
    """Not now: try again after `retry_ms` milliseconds."""

    def __init__(self, reason: Reason, retry_ms: int) -> None:
        super().__init__(reason)
        self.retry_ms = retry_ms


class FencedError(PerdureError):
    """We are stale: a newer term, epoch or attempt exists. Stop acting on the old one."""


class PeerLost(PerdureError):
    """The other side is gone or unreachable; recovery decides what follows."""


def invalid(text: str) -> Rejected:
    """A Rejected for bad input; `text` names the thing."""
    return Rejected(Reason(kind=ReasonKind.INVALID, text=text))
