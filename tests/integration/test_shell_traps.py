"""gRPC's traps that cost real systems their failure detection, each shown shut with our options (PROTOCOL §1, §7)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane.runtime.probe import refused_twice
from controlplane.runtime.timing import channel_options, derive_timings
from tests.support.cluster import ROOT, eventually, free_port

TIMINGS = derive_timings()
SERVING = health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def peer(port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """The server of rpc_peer.py, ready."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.rpc_peer", str(port)),
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert (await asyncio.wait_for(process.stdout.readline(), 30)).startswith(b"ready")
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


def channel(port: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options(TIMINGS))


async def check(target: grpc.aio.Channel, **options: object) -> int:
    reply = await health_pb2_grpc.HealthStub(target).Check(health_pb2.HealthCheckRequest(), timeout=10, **options)
    return reply.status


async def test_a_stopped_peer_is_noticed() -> None:
    port = free_port()
    async with peer(port) as process, channel(port) as target:
        watch = health_pb2_grpc.HealthStub(target).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        process.send_signal(signal.SIGSTOP)
        # gRPC's documented keepalive options leave this unnoticed for 60 s
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(watch.read(), 10 * TIMINGS.session_silence)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not await refused_twice(f"127.0.0.1:{port}", TIMINGS), "a stopped process still accepts connections"


async def test_a_second_bind_on_a_taken_port_is_refused() -> None:
    port = free_port()
    async with peer(port):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.rpc_peer", str(port)),
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
        _, errors = await asyncio.wait_for(second.communicate(), 30)
        assert second.returncode == 3
        assert str(port) in errors.decode()
        async with channel(port) as target:
            assert await check(target) == SERVING


async def test_a_graceful_stop_refuses_the_port_while_old_streams_still_answer() -> None:
    port = free_port()
    async with peer(port) as process, channel(port) as target:
        watch = health_pb2_grpc.HealthStub(target).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        process.terminate()

        async def refused() -> bool:
            return await refused_twice(f"127.0.0.1:{port}", TIMINGS)

        await eventually("the port refuses", refused)
        # a refusal is no proof of death: this stream's peer lives and speaks
        reply = await asyncio.wait_for(watch.read(), 10)
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_restarted_peer_is_reached_at_once_by_a_new_channel() -> None:
    port = free_port()
    old = channel(port)
    async with peer(port) as process:
        assert await check(old) == SERVING
        process.kill()
        await process.wait()
        with pytest.raises(grpc.aio.AioRpcError):
            await check(old)
    async with peer(port), channel(port) as fresh:
        # without a subchannel pool of its own the new channel inherits the old one's backoff and fails at once
        assert await check(fresh) == SERVING
    await old.close()


async def test_a_channel_finds_its_peer_again_after_a_long_absence() -> None:
    port = free_port()
    async with channel(port) as target:
        async with peer(port) as process:
            assert await check(target) == SERVING
            process.kill()
        for _ in range(30):
            with pytest.raises(grpc.aio.AioRpcError):
                await check(target)
            await asyncio.sleep(0.05)
        async with peer(port):
            assert await check(target, wait_for_ready=True) == SERVING
