"""Clients of the shells: each waits on a real feed in a task of its own, and checks what it is given."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from controlplane.gateway.feed import Feed
from controlplane.gateway.messages import Deliver, Failed, RequestAccepted
from controlplane.gateway.text_stream import Piece
from controlplane.runtime.ids import DeploymentId, RequestId
from controlplane.runtime.messages.common import Sampling
from controlplane.runtime.packing import pack_u32
from tools.sim.arithmetic import VOCABULARY, reference

if TYPE_CHECKING:
    from tools.sim.shells.hosts import ControlPlaneHost
    from tools.sim.shells.world import ShellWorld

DEADLINE_S = 600.0
SIGN_OF_LIFE_S = 60.0
"""So rare that it wakes nobody whose wake-up was lost."""
DRAIN_S = 0.05
LEAVES_SHARE = 0.1


@dataclass(slots=True)
class Client:
    """One request, from its sending to its end; the journal's sink."""

    request: RequestId
    expected: list[int]
    given: list[int] = field(default_factory=list[int])
    # Leaves after so many tokens; None: stays.
    leaves_after: int | None = None
    feed: Feed = field(default_factory=lambda: Feed(SIGN_OF_LIFE_S))
    # "finished", "left", "cut" (its gateway ended), or the failure's name; "" while it is open.
    outcome: str = ""

    def started(self, cached_tokens: int) -> None:
        pass

    def deliver(self, delivered: Deliver) -> None:
        finish = delivered.finish.reason.name if delivered.finish is not None else None
        self.feed.push(Piece(0, "", delivered.first_index, tuple(delivered.tokens), finish=finish))

    def failed(self, failed: Failed) -> None:
        self.feed.fail(failed)

    async def take(self) -> None:
        """Everything there is for it. Asserts that it is right: in order, once, as computed alone."""
        while not self.feed.over:
            for piece in await self.feed.news():
                assert piece.first_index == len(self.given), f"{self.request}: token {piece.first_index}"
                self.given += piece.token_ids
                assert self.given == self.expected[: len(self.given)], f"{self.request}: wrong tokens"
                assert piece.finish is None or self.given == self.expected, f"{self.request}: cut short"
            if self.leaves_after is not None and len(self.given) >= self.leaves_after:
                return


class Crowd:
    """All clients of a world."""

    def __init__(self, world: ShellWorld) -> None:
        self._world = world
        self.clients: list[Client] = []

    def send(self, gateway: ControlPlaneHost) -> Client | None:
        """A new request there. None: that gateway is not ready."""
        if gateway.requests is None:
            return None
        random = self._world.kernel.random
        prompt = array("I", [random.randrange(1, VOCABULARY - 1) for _ in range(random.randrange(1, 25))])
        sampling = Sampling(max_tokens=random.randrange(1, 50), ignore_eos=True)
        seed = random.randrange(1000)
        client = Client(
            RequestId(f"{random.getrandbits(128):032x}"),
            reference(prompt, seed, sampling.max_tokens, ignore_eos=True),
            leaves_after=random.randrange(1, 10) if random.random() < LEAVES_SHARE else None,
        )
        client.feed.open_choices = 1
        asked = RequestAccepted(
            request=client.request,
            deployment=DeploymentId("m"),
            prompt=pack_u32(prompt),
            sampling=sampling,
            seeds=(seed,),
            deadline=self._world.kernel.now + DEADLINE_S,
        )
        self.clients.append(client)
        # A client's task belongs to its gateway's process, as a handler of its HTTP server does.
        self._world.spawn(self._attend(gateway, client, asked), gateway.life)
        return client

    async def _attend(self, gateway: ControlPlaneHost, client: Client, asked: RequestAccepted) -> None:
        assert gateway.requests is not None
        try:
            gateway.requests.open(asked, client)
            await client.take()
            if client.feed.failure is not None:
                client.outcome = client.feed.failure.failure.value
                return
            complete = client.given == client.expected
            await asyncio.sleep(DRAIN_S if complete else 0)
            client.outcome = "finished" if complete else "left"
        finally:
            client.outcome = client.outcome or "cut"
            client.feed.close()
            gateway.requests.leave(client.request, complete=client.outcome == "finished")
