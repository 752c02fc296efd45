"""Proof of death: a peer whose connection worked, broke, and whose port then refuses twice (PROTOCOL H4).

A connect that succeeds proves nothing (the kernel accepts for a stopped process), and gRPC's own "connection refused"
may be a cached one; only a raw TCP refusal is news.
"""

from __future__ import annotations

import asyncio
import socket

import grpc
import grpc.aio

from controlplane.runtime.clock import Clock, SystemClock
from controlplane.runtime.timing import Timings, channel_options

CONNECTS = 2
SYSTEM_CLOCK = SystemClock()


async def refused_twice(address: str, timings: Timings, clock: Clock = SYSTEM_CLOCK) -> bool:
    """True if two TCP connects to `address` (host:port), `probe_gap` apart, were both refused."""
    for attempt in range(CONNECTS):
        if attempt:
            await clock.sleep(timings.probe_gap)
        if not await _refused(address, timings.probe_connect):
            return False
    return True


async def _refused(address: str, timeout: float) -> bool:
    """True if every address that the host's name stands for refuses. Silence, no route, no name: False."""
    loop = asyncio.get_running_loop()
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(timeout):
            infos = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            for family, kind, protocol, _, target in infos:
                with socket.socket(family, kind, protocol) as connection:
                    connection.setblocking(False)
                    try:
                        await loop.sock_connect(connection, target)
                    except ConnectionRefusedError:
                        continue
                    return False
    except (OSError, TimeoutError):
        return False
    return True


class PeerConnection:
    """A gRPC connection kept to a peer for no other purpose than to see it break; needs no service there."""

    def __init__(self, address: str, timings: Timings) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=channel_options(timings))

    @property
    def works(self) -> bool:
        """True while connected. Asking also starts an attempt to connect."""
        return self._state() is grpc.ChannelConnectivity.READY

    async def until_it_works(self) -> None:
        # Each state is read once: it changes in gRPC's threads, also between two lines of ours.
        while (state := self._state()) is not grpc.ChannelConnectivity.READY:
            await self._channel.wait_for_state_change(state)

    async def until_it_breaks(self) -> None:
        while (state := self._state()) is grpc.ChannelConnectivity.READY:
            await self._channel.wait_for_state_change(state)

    async def close(self) -> None:
        await self._channel.close(None)

    def _state(self) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect=True)
