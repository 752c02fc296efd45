"""What passes between the etcd client and its users: plain data, transactions and errors, no generated types.

Keys are text, values are bytes, times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from controlplane.runtime.errors import FencedError, Rejected, Retryable
from controlplane.runtime.messages.common import Reason, ReasonKind


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdOptions:
    """Where etcd is and who we are to it."""

    # host:port each, with or without http:// or https:// before it.
    endpoints: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    # PEM files. `ca` switches TLS on; `cert` and `key` belong together (mutual TLS).
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    # Counts the puts since the key was created.
    version: int
    # 0: under no lease.
    lease: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Keys of a range as they stood together at `revision`."""

    revision: int
    items: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Lease:
    id: int
    # As granted: etcd raises what is below its minimum.
    ttl: int


@dataclass(frozen=True, slots=True)
class EtcdStatus:
    """One member's own view. `leader` is 0 while it knows none."""

    endpoint: str
    version: str
    member: int
    leader: int
    revision: int
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EtcdMember:
    id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EtcdAlarm:
    member: int
    # "NOSPACE" (etcd takes no writes) or "CORRUPT".
    kind: str


class Target(Enum):
    VALUE = "value"
    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"
    VERSION = "version"


@dataclass(frozen=True, slots=True)
class Compare:
    """One condition of a transaction: `target` of `key` equals `operand`. An absent key has revisions and version 0."""

    key: str
    target: Target
    operand: bytes | int


def absent(key: str) -> Compare:
    return Compare(key, Target.CREATE_REVISION, 0)


def value_is(key: str, value: bytes) -> Compare:
    """False for an absent key too."""
    return Compare(key, Target.VALUE, value)


def mod_revision_is(key: str, revision: int) -> Compare:
    return Compare(key, Target.MOD_REVISION, revision)


def create_revision_is(key: str, revision: int) -> Compare:
    return Compare(key, Target.CREATE_REVISION, revision)


def version_is(key: str, version: int) -> Compare:
    return Compare(key, Target.VERSION, version)


@dataclass(frozen=True, slots=True)
class Get:
    key: str


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


Op = Get | Put | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class Txn:
    """All of `success` at once if every comparison holds, else all of `failure`."""

    when: tuple[Compare, ...]
    success: tuple[Op, ...]
    failure: tuple[Op, ...] = ()


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`reads` answers the Gets of the branch that ran, in their order; None for an absent key."""

    succeeded: bool
    revision: int
    reads: tuple[KeyValue | None, ...]


class EtcdUnavailable(Retryable):
    """No answer in time, or etcd cannot serve now. A write may or may not have happened."""

    def __init__(self, text: str, retry_ms: int) -> None:
        super().__init__(Reason(kind=ReasonKind.STORE_UNAVAILABLE, text=text), retry_ms)


class EtcdDenied(Rejected):
    """Wrong credentials, or a right that the user lacks."""

    def __init__(self, text: str) -> None:
        super().__init__(Reason(kind=ReasonKind.INVALID, text=text))


class EtcdLeaseGone(FencedError):
    """A write under a lease that etcd no longer knows."""

    def __init__(self, text: str) -> None:
        super().__init__(Reason(kind=ReasonKind.LEASE_EXPIRED, text=text))


def prefix_end(prefix: str) -> bytes:
    """First key after every key that starts with `prefix`. Prefixes are ASCII and not empty."""
    encoded = prefix.encode("ascii")
    return encoded[:-1] + bytes([encoded[-1] + 1])
