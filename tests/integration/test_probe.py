"""Proof of death on real sockets: only two refusals count, and only after a connection that worked."""

from __future__ import annotations

import asyncio
import socket

import grpc.aio

from controlplane.runtime.clock import SystemClock
from controlplane.runtime.etcd_server import free_port
from controlplane.runtime.probe import PeerConnection, refused_twice
from controlplane.runtime.timing import server_options
from tests.support.etcd import TIMINGS


async def test_a_closed_port_refuses_twice() -> None:
    port = free_port("127.0.0.1")
    assert await refused_twice(f"127.0.0.1:{port}", TIMINGS)
    assert await refused_twice(f"localhost:{port}", TIMINGS)


async def test_a_listener_that_never_accepts_is_no_proof() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not await refused_twice(f"127.0.0.1:{listener.getsockname()[1]}", TIMINGS)


async def test_no_name_is_no_proof() -> None:
    assert not await refused_twice("no-such-host.invalid:1", TIMINGS)


class OpeningClock(SystemClock):
    """Opens a port while the prober waits between its connects."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    async def sleep(self, seconds: float) -> None:
        self._listener.listen()


async def test_one_refusal_is_no_proof() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert await refused_twice(address, TIMINGS)
        assert not await refused_twice(address, TIMINGS, OpeningClock(listener))


async def test_a_connection_works_breaks_and_works_again() -> None:
    port = free_port("127.0.0.1")
    connection = PeerConnection(f"127.0.0.1:{port}", TIMINGS)
    assert not connection.works
    for _ in range(2):
        server = grpc.aio.server(options=server_options(TIMINGS))
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await asyncio.wait_for(connection.until_it_works(), 10)
        assert connection.works
        await server.stop(None)
        await asyncio.wait_for(connection.until_it_breaks(), 10)
        assert not connection.works
    await connection.close()
