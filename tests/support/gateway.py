"""A gateway with a leader and workers around it, all in this process and over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc.aio
import openai

from controlplane.gateway.gateway import Gateway
from controlplane.gateway.limits import GatewayLimits
from controlplane.gateway.tokenizer import ModelTokenizer
from controlplane.runtime.clock import SystemClock
from controlplane.runtime.ids import Incarnation, draw_id
from controlplane.runtime.packing import pack_u32
from controlplane.runtime.timing import Timings, derive_timings, server_options
from tests.support.leader_peer import LeaderBook, LeaderPeer
from tests.support.serving_peer import CLUSTER, WorkerPeer

PATIENCE_S = 20.0


@dataclass
class Stage:
    """Everything a test may pull at."""

    gateway: Gateway
    leader: LeaderPeer
    book: LeaderBook
    workers: list[WorkerPeer]
    tokenizer: ModelTokenizer
    timings: Timings
    grpc_address: str
    http: aiohttp.ClientSession
    extras: list[LeaderPeer] = field(default_factory=list)

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.gateway.url}/v1", api_key="none", max_retries=0)

    async def post(self, path: str, body: object) -> tuple[int, dict[str, str], dict[str, object]]:
        """Status, headers (names in lower case) and JSON of one request."""
        async with self.http.post(f"{self.gateway.url}{path}", json=body) as answer:
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, headers, await answer.json()

    def prompt(self, text: str) -> bytes:
        """A completion's prompt as the workers see it."""
        return pack_u32(self.tokenizer.encode(text, add_special_tokens=True))


async def until(holds: Callable[[], object], what: str) -> None:
    """Poll until `holds` is true."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not holds():
        assert asyncio.get_running_loop().time() < deadline, f"{what} did not come about in {PATIENCE_S} s"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def staged(
    folder: Path,
    *,
    workers: int = 2,
    step_s: float = 0.002,
    limits: GatewayLimits | None = None,
    timings: Timings | None = None,
) -> AsyncIterator[Stage]:
    """A ready gateway over `workers` workers of the model in `folder`."""
    timings = timings or derive_timings(1.2, 0.1)
    tokenizer = ModelTokenizer(folder)
    peers = [WorkerPeer(f"w{place}", tokenizer.vocab_size, timings, step_s) for place in range(workers)]
    for peer in peers:
        await peer.start()
    leader = LeaderPeer(timings, str(folder))
    leader.workers = list(peers)
    await leader.start()
    book = LeaderBook()
    book.set(leader.address, leader.term)
    gateway = Gateway(
        "g1",
        Incarnation(draw_id()),
        CLUSTER,
        timings,
        book,
        "127.0.0.1",
        0,
        limits or GatewayLimits(stop_grace_s=1.0),
        SystemClock(),
    )
    server = grpc.aio.server(options=server_options(timings))
    gateway.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await gateway.start()
    await server.start()
    async with aiohttp.ClientSession() as http:
        stage = Stage(gateway, leader, book, peers, tokenizer, timings, f"127.0.0.1:{port}", http)
        try:
            if workers:
                await until(lambda: gateway.ready()[0], "readiness")
            yield stage
        finally:
            await gateway.stop()
            await server.stop(None)
            for peer in (*stage.workers, stage.leader, *stage.extras):
                await peer.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
