"""A request that kills what runs it, as one with a fatal input would: its ranks get a SIGSEGV wherever it runs.

From outside nobody can aim at its own steps among those of others, so it runs alone. (A SIGKILL would blame nobody: no
input causes one.)
"""

from __future__ import annotations

import asyncio
import os
import signal

import grpc.aio

from controlplane.runtime.ids import draw_id
from protos.perdure.v1 import inference_pb2, inference_pb2_grpc
from tools.chaos.fault import Target
from tools.chaos.live import ChaosError, LiveCluster

BLAMED_MAX = 2
"""Replicas that a request may hurt: once beside others, once alone. A signal between two steps blames nobody."""

TOKENS = 400
"""Long enough to be met while it runs."""

POLL_S = 0.02
LIMIT_S = 90.0


async def poison(cluster: LiveCluster) -> str:
    """Run one to its end; what became of it. Raises ChaosError if it is not ended honestly, or hurts too many."""
    request, heard = draw_id(), asyncio.Event()
    running = asyncio.create_task(_generate(await cluster.working_address(), request, heard))
    killed: set[tuple[str, int]] = set()
    try:
        async with asyncio.timeout(LIMIT_S):
            while not running.done():
                place = await _place(cluster, request)
                if heard.is_set() and place is not None and place not in killed:
                    os.kill(await cluster.find(Target.model_validate(f"rank {place[0]}")), signal.SIGSEGV)
                    killed.add(place)
                    heard.clear()
                await asyncio.wait({running}, timeout=POLL_S)
    except TimeoutError as error:
        raise ChaosError(
            f"the request that kills did not end within {LIMIT_S:g} s; it hurt {sorted(killed)}"
        ) from error
    finally:
        running.cancel()
    told = running.result()
    blamed = [(row.replica, row.epoch) for row in await cluster.failures() if request in row.suspects]
    hurt = ", ".join(f"{replica} @ {epoch}" for replica, epoch in blamed)
    if not told or not 1 <= len(blamed) <= BLAMED_MAX:
        raise ChaosError(f"the request that kills ended with {told or 'all its tokens'!r} and hurt {hurt}")
    return f"the request that kills hurt {hurt} and was told: {told}"


async def _generate(address: str, request: str, heard: asyncio.Event) -> str:
    """The error that the client is told; empty if there is none. `heard` is set by each token: it runs."""
    sampling = inference_pb2.SamplingOptions(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    asked = inference_pb2.GenerateRequest(prompt="A word that kills.", request=request, sampling=sampling)
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(asked):
                heard.set()
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
    return ""


async def _place(cluster: LiveCluster, request: str) -> tuple[str, int] | None:
    """(replica, epoch) that it runs on now, as the leader knows."""
    for row in await cluster.requests():
        if row.id == request and row.replica and row.phase == "assigned":
            return row.replica, row.epoch
    return None
