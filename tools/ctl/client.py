"""A connection to Admin, and every way in which it can fail as one line."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from protos.perdure.v1.admin_pb2_grpc import AdminStub
from tools.up.state import StateDir, local_state_dir

CALL_TIMEOUT_S = 10.0


class CtlError(Exception):
    """The command failed; the text is one line for people."""


def find_addresses(given: str | None) -> list[str]:
    """Where to ask: `--address`, PERDURE_ADDRESS, or the cluster that `perdure up` runs here. Several may be given,
    with commas; any control plane answers."""
    named = given or os.environ.get("PERDURE_ADDRESS")
    if named:
        return [address.strip() for address in named.split(",") if address.strip()]
    state = StateDir(local_state_dir())
    running = state.running()
    if running is None:
        raise CtlError(f"no cluster runs on {state.path}: give --address HOST:PORT or set PERDURE_ADDRESS")
    return list(running.addresses)


@contextmanager
def admin(addresses: list[str], timeout_s: float = CALL_TIMEOUT_S) -> Iterator[AdminStub]:
    """A stub at the first address that answers. Raises CtlError."""
    channel = _reachable(addresses, timeout_s)
    try:
        yield AdminStub(channel)
    except grpc.RpcError as error:
        raise CtlError(_refusal(error, addresses)) from error
    finally:
        channel.close()


def _reachable(addresses: list[str], timeout_s: float) -> grpc.Channel:
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise CtlError(f"{address!r} is not HOST:PORT")
        try:
            # gRPC would try a refused address again and again.
            socket.create_connection((host.strip("[]"), int(port)), timeout_s / len(addresses)).close()
        except (OSError, OverflowError):
            continue
        return grpc.insecure_channel(address)
    raise CtlError(f"nothing answers at {', '.join(addresses)}")


def _refusal(error: grpc.RpcError, addresses: list[str]) -> str:
    code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{', '.join(addresses)} did not answer in time"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"{', '.join(addresses)} is no Perdure control plane: {details}"
    return f"{details} ({code.name.lower().replace('_', ' ')})"
