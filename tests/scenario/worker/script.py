"""Text scenarios: commands, `----`, and what the worker daemon's core did, reviewed by eye.

A file holds blocks parted by empty lines. A block is command lines, a line `----`, then the effects, one a line
(heartbeats are left out). `#` begins a comment. Commands:

    devices N                              first of all; a worker with so many
    ranks up                               the zygote forks what was asked for, and they say Hello
    leader attaches TERM | detaches | refuses TERM ADDRESS
    leader prepares REPLICA@EPOCH DEVICE... [term=T]      "-" is a device of another node
    leader forms|loads|aborts|releases REPLICA@EPOCH [KIND]
    leader assigns REQUEST.ATTEMPT REPLICA@EPOCH
    leader preloads DEVICE RANK            that shard on a free device
    leader drains SECONDS | undrains | relets
    rank DEVICE prepared|formed|loaded|aborted|fails EPOCH [DURING]
    rank DEVICE holds RANK | nothing [why]  its weights; "why" for a preload that failed
    rank DEVICE begins EPOCH REQUEST/CHOICE...
    rank DEVICE gives EPOCH REQUEST/CHOICE=FIRST:TOKENS... [done=REQUEST/CHOICE]
    rank DEVICE exits code=N | signal=N
    rank DEVICE looks STATE COLLECTIVE [progress=N]       what the daemon sees of it
    gateway NAME connects [INCARNATION] | disconnects | reads
    gateway NAME opens REQUEST[.ATTEMPT] [key=value...]
    gateway NAME cancels|ends REQUEST
    gateway NAME syncs [REQUEST[.ATTEMPT]/CHOICE=NEXT@SLOT...]
    gateway NAME resumes REQUEST
    lease granted ID | gone
    term TERM
    stop
    wait SECONDS | freeze SECONDS
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from controlplane.runtime.ids import Attempt, Epoch, ReplicaId, RequestId, Slot, Term
from controlplane.runtime.messages import serve, session
from controlplane.runtime.messages.common import Permit, Reason, ReasonKind
from controlplane.runtime.messages.weights import HeldWeights, PreloadWeights
from dataplane import frames
from dataplane.core.messages import (
    Effect,
    LeaseGone,
    LeaseGranted,
    RankSample,
    SpawnRank,
    StopAsked,
    TermSeen,
)
from tests.scenario.coordinator.script import Block, parse
from tests.scenario.worker.model import CAPACITY, SPEC, Worker
from tests.scenario.worker.shown import show


def play(text: str) -> list[tuple[Block, tuple[str, ...]]]:
    """Run the scenario; each block with what really happened."""
    script = Script()
    return [(block, tuple(line for command in block.commands for line in script.run(command))) for block in parse(text)]


def rewrite(path: Path) -> None:
    """Put what really happens into the file, for a person to review."""
    answers = iter(play(path.read_text()))
    chunks: list[str] = []
    for chunk in path.read_text().strip().split("\n\n"):
        lines = chunk.splitlines()
        head = lines[: lines.index("----")] if "----" in lines else lines
        if any(not line.startswith("#") for line in head):
            _, happened = next(answers)
            head = [*head, "----", *happened]
        chunks.append("\n".join(head))
    path.write_text("\n\n".join(chunks) + "\n")


class Script:
    """Runs commands on a worker's core."""

    def __init__(self) -> None:
        self.worker = Worker()
        self._wanted: list[Effect] = []

    def run(self, line: str) -> list[str]:
        """The effects of one command, as lines."""
        verb, *words = line.split()
        effects = getattr(self, f"_{verb}")(*words)
        self._wanted += [effect for effect in effects if isinstance(effect, SpawnRank)]
        names = {stream: name for name, stream in self.worker.streams.items()}
        return [text for effect in effects if (text := show(effect, names, self.worker))]

    # ------------------------------------------------------------ commands

    def _devices(self, count: str) -> list[Effect]:
        self.worker = Worker(int(count))
        return self.worker.tick()

    def _ranks(self, _up: str) -> list[Effect]:
        wanted, self._wanted = self._wanted, []
        return self.worker.spawn(wanted)

    def _wait(self, seconds: str) -> list[Effect]:
        return self.worker.wait(float(seconds))

    def _freeze(self, seconds: str) -> list[Effect]:
        return self.worker.freeze(float(seconds))

    def _term(self, term: str) -> list[Effect]:
        return self.worker.feed(TermSeen(Term(int(term)), f"leader-{term}"))

    def _stop(self) -> list[Effect]:
        return self.worker.feed(StopAsked(Reason(kind=ReasonKind.ADMIN, text="SIGTERM received")))

    def _lease(self, what: str, lease: str = "0") -> list[Effect]:
        return self.worker.feed(LeaseGranted(int(lease)) if what == "granted" else LeaseGone())

    def _leader(self, verb: str, *words: str) -> list[Effect]:
        options, plain = _options(words)
        term = int(options.get("term", "1"))
        worker = self.worker
        match verb:
            case "attaches":
                return worker.attach(int(plain[0]))
            case "detaches":
                return worker.detach()
            case "prepares":
                replica, epoch = _epoch(plain[0])
                return worker.prepare(replica, epoch, plain[1:], term=term)
            case _:
                return worker.leader_says(_from_leader(verb, plain, term), term)

    def _rank(self, device: str, verb: str, *words: str) -> list[Effect]:
        options, plain = _options(words)
        worker = self.worker
        match verb:
            case "exits":
                return worker.exits(device, **{key: int(value) for key, value in options.items()})
            case "looks":
                progress = int(options.get("progress", "0"))
                worker.samples[device] = RankSample(progress, int(plain[1]), 0, plain[0])
                return []
            case "holds":
                return worker.says(device, _holds(*plain))
            case "begins":
                return worker.step_begins(device, int(plain[0]), [_choice(word) for word in plain[1:]])
            case "gives":
                done = [_choice(word) for word in options.pop("done", "").split(",") if word]
                return worker.step_ends(
                    device, int(plain[0]), {_choice(k): _tokens(v) for k, v in options.items()}, done
                )
            case _:
                return worker.says(device, _from_rank(verb, *plain))

    def _gateway(self, name: str, verb: str, *words: str) -> list[Effect]:
        options, plain = _options(words)
        worker = self.worker
        match verb:
            case "connects":
                return worker.connect(name, plain[0] if plain else None)
            case "disconnects":
                return worker.disconnect(name)
            case "reads":
                return worker.flush(name)
            case "opens":
                request, _, attempt = plain[0].partition(".")
                return worker.open(name, request, attempt=int(attempt or 1), **_body(options))
            case "syncs":
                cursors = tuple(_cursor(key, value) for key, value in options.items())
                return worker.gateway_says(name, serve.SyncSlots(slots=cursors))
            case "cancels":
                reason = Reason(kind=ReasonKind.CLIENT_GONE)
                return worker.gateway_says(name, serve.CancelSlots(slots=worker.slots_of(plain[0]), reason=reason))
            case "ends":
                return worker.gateway_says(name, serve.EndRequests(requests=(RequestId(plain[0]),)))
            case _:
                assert verb == "resumes", verb
                return worker.gateway_says(name, serve.ResumeRequest(request=RequestId(plain[0])))


def _from_leader(verb: str, words: list[str], term: int) -> session.AttachDown:
    reason = Reason(kind=ReasonKind.ADMIN, text="the scenario says so")
    match verb:
        case "refuses":
            refusal = Reason(kind=ReasonKind.NOT_LEADER)
            return session.SessionRefused(reason=refusal, highest_term=Term(int(words[0])), leader_address=words[1])
        case "drains":
            return session.DrainNode(deadline_ms=round(float(words[0]) * 1000), reason=reason)
        case "undrains":
            return session.UndrainNode()
        case "preloads":
            return PreloadWeights(device=words[0], rank=int(words[1]), spec=SPEC)
        case "relets":
            return session.Relet(reason=reason)
        case "assigns":
            request, _, attempt = words[0].partition(".")
            replica, epoch = _epoch(words[1])
            permit = Permit(
                request=RequestId(request), attempt=Attempt(int(attempt)), replica=replica, epoch=epoch, term=Term(term)
            )
            return session.AssignBatch(permits=(permit,))
        case _:
            return _about_replica(verb, *_epoch(words[0]), words[1:], reason)


def _about_replica(verb: str, replica: ReplicaId, epoch: Epoch, words: list[str], reason: Reason) -> session.AttachDown:
    if words:
        reason = Reason(kind=ReasonKind[words[0]], text=words[0].lower())
    match verb:
        case "forms":
            return session.FormGroup(replica=replica, epoch=epoch, rendezvous="h:1", deadline_ms=3000)
        case "loads":
            return session.LoadReplica(replica=replica, epoch=epoch, deadline_ms=0)
        case "aborts":
            return session.AbortGroup(replica=replica, epoch=epoch, reason=reason)
        case _:
            assert verb == "releases", verb
            return session.ReleaseReplica(replica=replica, epoch=epoch, reason=reason)


def _from_rank(verb: str, epoch: str, during: str = "step") -> frames.RankFrame:
    number = Epoch(int(epoch))
    match verb:
        case "prepared":
            return frames.Prepared(number, "h:1", "")
        case "formed":
            return frames.Formed(number)
        case "loaded":
            return frames.Loaded(number, CAPACITY, "weights")
        case "aborted":
            return frames.Aborted(number)
        case _:
            assert verb == "fails", verb
            reason = Reason(kind=ReasonKind.OUT_OF_MEMORY, text="no memory")
            return frames.Failed(number, during, reason)


def _holds(rank: str, why: str = "") -> frames.Holds:
    if rank == "nothing":
        return frames.Holds(None, Reason(kind=ReasonKind.LOAD_FAILED, text=why) if why else None)
    number = int(rank)
    held = HeldWeights(
        deployment=SPEC.deployment, degrees=SPEC.degrees, rank=number, fingerprint=f"shard-{number}", address="w1:9"
    )
    return frames.Holds(held)


def _options(words: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    plain: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals:
            options[key] = value
        else:
            plain.append(word)
    return options, plain


def _epoch(word: str) -> tuple[ReplicaId, Epoch]:
    replica, _, epoch = word.partition("@")
    return ReplicaId(replica), Epoch(int(epoch))


def _choice(word: str) -> tuple[str, int]:
    request, _, choice = word.partition("/")
    return request, int(choice or 0)


def _tokens(word: str) -> tuple[int, list[int]]:
    """ "FIRST:COUNT": tokens that are their own index."""
    first, _, count = word.partition(":")
    return int(first), list(range(int(first), int(first) + int(count)))


def _body(options: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {key: value if key == "replica" else int(value) for key, value in options.items()}
    if "delivered" in values:
        values["delivered"] = tuple(range(values["delivered"]))
    return values


def _cursor(key: str, value: str) -> serve.SlotCursor:
    name, choice = _choice(key)
    request, _, attempt = name.partition(".")
    following, _, slot = value.partition("@")
    return serve.SlotCursor(
        slot=Slot(int(slot)),
        request=RequestId(request),
        choice=choice,
        attempt=Attempt(int(attempt or 1)),
        next_index=int(following),
    )
