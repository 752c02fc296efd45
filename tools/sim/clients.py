"""Clients: what they ask, what they must get, and what they do besides."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from controlplane.gateway.messages import ChoiceSeen, Deliver, Failed, RequestAccepted, ShadowFound, StreamAdopted
from controlplane.gateway.prefix import prefix_hashes
from controlplane.runtime.ids import DeploymentId, RequestId
from controlplane.runtime.messages.common import Sampling
from controlplane.runtime.messages.serve import FinishReason, Shadow
from controlplane.runtime.packing import pack_u32
from tools.sim.arithmetic import EOS, POISON, VOCABULARY, reference
from tools.sim.engine import BLOCK_TOKENS

if TYPE_CHECKING:
    from tools.sim.gateway import SimGateway
    from tools.sim.kernel import Kernel
    from tools.sim.worker import SimWorker

DEADLINE_S = 600.0
DRAIN_S = (0.001, 0.2)
RESUME_S = (0.01, 2.0)
RESUME_AGAIN_S = 1.0
RESUMES_MAX = 40
KEPT_SHARE = 0.5
"""Of a worker's grace: its clock may run fast, or leap."""
TOKEN_BYTES = 4


@dataclass(slots=True)
class Choice:
    expected: list[int]
    given: int = 0
    finished: bool = False


@dataclass(slots=True)
class Client:
    """One request, from its sending to its end; the journal's sink."""

    request: RequestId
    kernel: Kernel
    prompt: array[int]
    sampling: Sampling
    seeds: tuple[int, ...]
    priority: int
    poison: bool
    # Goes on at another gateway when its own dies.
    resumes: bool
    # Leaves after so many tokens; None: stays.
    leaves_after: int | None
    gateway: SimGateway
    # Running workers that hold the request, by the truth.
    holders: Callable[[RequestId], list[SimWorker]]
    choices: list[Choice] = field(default_factory=list[Choice])
    # "finished", "left", "cut" (its gateway died), "lost" (nobody could go on with it), or the failure's name; "" while
    # it is open.
    outcome: str = ""
    # Where it ran when its gateway died, and when that was.
    keeper: SimWorker | None = None
    cut_at: float = 0.0

    @property
    def open(self) -> bool:
        return not self.outcome

    def send(self) -> None:
        """Over the client's connection into its gateway."""
        if self.gateway.process.alive:
            self.gateway.process.run(self._open, self.gateway)
        else:
            self.end("cut")

    def _open(self, gateway: SimGateway) -> None:
        if not self.open or gateway is not self.gateway:
            return
        if not gateway.open:
            self.end("cut")
            return
        asked = RequestAccepted(
            request=self.request,
            deployment=DeploymentId("m"),
            prompt=pack_u32(self.prompt),
            sampling=self.sampling,
            seeds=self.seeds,
            priority=self.priority,
            prefix_hashes=prefix_hashes(pack_u32(self.prompt), BLOCK_TOKENS, salt="", fingerprint="m"),
            deadline=self.gateway.process.now() + DEADLINE_S,
        )
        self.gateway.requests.open(asked, self)

    # ------------------------------------------------------------ the journal's sink

    def started(self, cached_tokens: int) -> None:
        pass

    def deliver(self, delivered: Deliver) -> None:
        assert self.open, f"{self.request} gets tokens after its end"
        choice = self.choices[delivered.choice]
        assert not choice.finished, f"{self.request}/{delivered.choice} gets tokens after its finish"
        assert delivered.first_index == choice.given, (
            f"{self.request}: token {delivered.first_index}, not {choice.given}"
        )
        end = choice.given + len(delivered.tokens)
        got = list(delivered.tokens)
        assert got == choice.expected[choice.given : end], f"{self.request}: tokens from {choice.given} are wrong"
        choice.given = end
        if delivered.finish is not None:
            self._finish(choice, delivered.finish.reason)
        if self.leaves_after is not None and choice.given >= self.leaves_after:
            self.leaves_after = None
            self.gateway.process.soon(self._leave)

    def _finish(self, choice: Choice, reason: FinishReason) -> None:
        assert choice.given == len(choice.expected), f"{self.request}: finished at token {choice.given}"
        stops = choice.expected[-1] == EOS and not self.sampling.ignore_eos
        assert reason is (FinishReason.STOP if stops else FinishReason.LENGTH), f"{self.request}: {reason.name}"
        choice.finished = True
        if all(other.finished for other in self.choices):
            self.gateway.process.later(self.kernel.random.uniform(*DRAIN_S), self._drained)

    def failed(self, failed: Failed) -> None:
        self.end(failed.failure.value)

    # ------------------------------------------------------------ at another gateway

    def cut_off(self, others: list[SimGateway]) -> None:
        """Its gateway died or leaves: it goes on at another one, if it is of that kind."""
        if self.gateway.process.alive:
            self.gateway.requests.leave(self.request, complete=False)
        if all(choice.finished for choice in self.choices):
            self.end("finished")
        elif not self.resumes or not others:
            self.end("cut")
        else:
            self.keeper, self.cut_at = self._keeper(), self.kernel.now
            self.gateway = self.kernel.random.choice(others)
            self.kernel.tell("client", "request_resumed", request=self.request, gateway=self.gateway.process.name)
            delay = self.kernel.random.uniform(*RESUME_S)
            self.gateway.process.later(delay, self._resume, self.gateway)

    def _keeper(self) -> SimWorker | None:
        """The worker that runs what its gateway's journal says: it alone must keep the stream."""
        journal = self.gateway.state.journals.get(self.request)
        if journal is None or journal.placement is None:
            return None
        for worker in self.holders(self.request):
            here = worker.identity.serve_address == journal.placement.worker
            if here and worker.state.requests[self.request].attempt == journal.attempt:
                return worker
        return None

    def _expect_kept(self) -> None:
        """Nobody was found to have the stream; whoever had it may have died, or kept it in vain for as long as was
        promised."""
        keeper, kept_s = self.keeper, self.kernel.now - self.cut_at
        if keeper is not None and keeper.process.runs and kept_s < keeper.timings.resume_grace * KEPT_SHARE:
            held = self.request in keeper.state.requests
            assert held, f"{self.request} was dropped by {keeper.name} {kept_s:.1f} s after its gateway's death"

    def _resume(self, gateway: SimGateway) -> None:
        if gateway is self.gateway and gateway.open:
            gateway.process.spawn(self._go_on(gateway))

    async def _go_on(self, gateway: SimGateway) -> None:
        for _ in range(RESUMES_MAX):
            with gateway.requests.claim(self.request) as ours:
                assert ours, "nobody else resumes it"
                found: ShadowFound = await gateway.requests.seek(self.request)
                gateway.requests.sought(self.request)
                if found.shadow is not None:
                    self._adopt(gateway, found, found.shadow)
                    return
            self._expect_kept()
            if found.certain:
                holders = self.holders(self.request)
                names = [worker.name for worker in holders]
                assert not holders, f"{self.request} is held by {names} and denied"
                break
            await gateway.process.sleep(RESUME_AGAIN_S)
        self.end("lost")

    def _adopt(self, gateway: SimGateway, found: ShadowFound, shadow: Shadow) -> None:
        held = [len(choice.delivered) // TOKEN_BYTES for choice in shadow.choices]
        if any(choice.given > tokens for choice, tokens in zip(self.choices, held, strict=True)):
            self._expect_kept()
            self.end("lost")
            return
        asked = RequestAccepted(
            request=self.request,
            deployment=DeploymentId("m"),
            prompt=shadow.prompt,
            sampling=shadow.sampling,
            seeds=tuple(choice.seed for choice in shadow.choices),
            priority=self.priority,
            deadline=gateway.process.now() + DEADLINE_S,
        )
        seen = tuple(ChoiceSeen(choice.given, choice.finished) for choice in self.choices)
        gateway.requests.adopt(StreamAdopted(asked, found.worker, found.node, shadow, seen), self)

    def _drained(self) -> None:
        if self.open:
            self.end("finished")
            self.gateway.requests.leave(self.request, complete=True)

    def _leave(self) -> None:
        if self.open and not all(choice.finished for choice in self.choices):
            self.end("left")
            self.gateway.requests.leave(self.request, complete=False)

    def end(self, outcome: str) -> None:
        assert self.open
        self.outcome = outcome
        self.kernel.tell("client", "request_ended", request=self.request, outcome=outcome)


class Crowd:
    """Makes clients and remembers them."""

    def __init__(self, kernel: Kernel, holders: Callable[[RequestId], list[SimWorker]]) -> None:
        self.kernel = kernel
        self.holders = holders
        self.clients: dict[RequestId, Client] = {}
        self._beginnings = [self._tokens(12) for _ in range(4)]

    def _tokens(self, count: int) -> list[int]:
        return [self.kernel.random.randrange(1, VOCABULARY - 1) for _ in range(count)]

    def make(self, gateway: SimGateway, *, poison: bool = False) -> Client:
        random = self.kernel.random
        prompt = self._tokens(random.randrange(1, 25))
        if random.random() < 0.4:
            prompt = random.choice(self._beginnings) + prompt
        if poison:
            prompt = [POISON, *prompt]
        sampling = Sampling(max_tokens=random.randrange(1, 60), ignore_eos=random.random() < 0.5)
        seeds = tuple(random.randrange(1000) for _ in range(2 if random.random() < 0.15 else 1))
        client = Client(
            request=RequestId(f"{random.getrandbits(128):032x}"),
            kernel=self.kernel,
            prompt=array("I", prompt),
            sampling=sampling,
            seeds=seeds,
            priority=random.choice((0, 0, 0, 1)),
            poison=poison,
            resumes=random.random() < 0.7,
            leaves_after=random.randrange(1, 20) if random.random() < 0.08 else None,
            gateway=gateway,
            holders=self.holders,
        )
        client.choices = [
            Choice(reference(client.prompt, seed, sampling.max_tokens, ignore_eos=sampling.ignore_eos))
            for seed in seeds
        ]
        self.clients[client.request] = client
        self.kernel.tell("client", "request_sent", request=client.request, gateway=gateway.process.name, poison=poison)
        client.send()
        return client

    def open(self) -> list[Client]:
        return [client for client in self.clients.values() if client.open]

    def gateway_died(self, gateway: SimGateway, others: list[SimGateway]) -> None:
        for client in self.open():
            if client.gateway is gateway:
                client.cut_off(others)
