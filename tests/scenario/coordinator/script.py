"""Text scenarios: commands, `----`, and what the coordinator did, reviewed by eye.

A file holds blocks parted by empty lines. A block is command lines, a line `----`, then the expected effects, one a
line (heartbeats are left out). `#` begins a comment. Commands:

    store [m=REPLICAS [tp=N] [pp=N] [spares=N] [elastic]] [peers=NAMES] [restored]
    worker NAME joins [devices=N]          a fresh process registers and attaches with its Snapshot
    worker NAME dies | breaks | returns | stops | goes-on | hides | shows | unregisters | registers
    worker NAME rank DEVICE exits [suspects=IDS]
    worker NAME device DEVICE sickens | recovers   its preloads fail, or do not
    worker NAME respawns                   a new rank is up where one exited
    worker NAME answers [N]                it handles its oldest frames
    worker NAME fails REPLICA PHASE [kind=KIND]   a GroupState that is not ok
    worker NAME load REPLICA key=value...  what its heartbeats say from now on
    worker NAME leaves SECONDS | drained | fences TERM
    gateway NAME joins [REQUEST@REPLICA@EPOCH...]
    gateway NAME routes REQUEST[.ATTEMPT]... [key=value...]
    gateway NAME ends REQUEST[.ATTEMPT]... | breaks
    admin drain|undrain NODE | cancel REQUEST | apply m=REPLICAS [path=P] [tp=N] [pp=N] [spares=N] [elastic]
    etcd mute|heard|down|up|writes|revokes
    probe                                  outstanding probes are made
    settle                                 etcd, probes and workers answer until all is quiet
    tick [N] [every=SECONDS]
    new leader                             another process takes over: same etcd, same workers, next term
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controlplane.core.messages import (
    AdminAnswered,
    AdminAsked,
    ApplyAsked,
    AskId,
    CancelAsked,
    CloseConnection,
    DeleteDeployment,
    DeletePlacement,
    DrainAsked,
    Effect,
    LeaseHeard,
    LeaseMuted,
    Probe,
    Recorded,
    RevokeLease,
    SendGateway,
    SendWorker,
    StepDown,
    UndrainAsked,
    WriteDeployment,
    WritePlacement,
)
from controlplane.runtime.ids import Attempt, DeploymentId, Epoch, GatewayId, NodeId, ReplicaId, RequestId, Term
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.route import (
    EndBatch,
    EndEntry,
    JournalInfo,
    JournalPhase,
    LeaderHeartbeat,
    Outcome,
    ReplicaEpoch,
    ReplicaTable,
    RouteBatch,
    RouteCause,
    RoutedBatch,
    RouteEntry,
)
from controlplane.runtime.messages.session import AssignBatch, Drained, Fenced, GroupPhase, Leaving, LoadReplica
from controlplane.runtime.messages.weights import PreloadWeights, WeightSource
from controlplane.runtime.records import DeploymentRecord
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import deployment, entry


@dataclass(frozen=True)
class Block:
    commands: tuple[str, ...]
    expected: tuple[str, ...]


def parse(text: str) -> Iterator[Block]:
    for chunk in text.strip().split("\n\n"):
        lines = [line for line in chunk.splitlines() if not line.startswith("#")]
        if lines:
            middle = lines.index("----") if "----" in lines else len(lines)
            yield Block(tuple(lines[:middle]), tuple(lines[middle + 1 :]))


def play(text: str) -> list[tuple[Block, tuple[str, ...]]]:
    """Run the scenario; each block with what really happened."""
    script = Script()
    played: list[tuple[Block, tuple[str, ...]]] = []
    for block in parse(text):
        happened = [line for command in block.commands for line in script.run(command)]
        played.append((block, tuple(happened)))
    return played


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
    """Runs commands on a modelled cluster."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.asks = 0

    def run(self, line: str) -> list[str]:
        words = [word for word in line.split() if "=" not in word]
        options = dict(word.split("=", 1) for word in line.split() if "=" in word)
        effects = getattr(self, f"_{words[0]}")(words[1:], options)
        return [text for effect in effects if (text := self.show(effect))]

    # ------------------------------------------------------------ commands

    def _store(self, words: list[str], options: dict[str, str]) -> list[Effect]:
        if "m" in options:
            self.cluster.deployments[DeploymentId("m")] = _deployment(words, options)
        peers = tuple(options["peers"].split(",")) if "peers" in options else ()
        return self.cluster.load(restored="restored" in words, peers=peers)

    def _worker(self, words: list[str], options: dict[str, str]) -> list[Effect]:
        cluster, name = self.cluster, NodeId(words[0])
        if words[1] == "joins":
            fresh = cluster.add_worker(name, int(options.get("devices", 1)))
            return cluster.register(fresh) + cluster.attach(fresh)
        worker = cluster.workers[name]
        match words[1:]:
            case ["dies"]:
                return cluster.kill(worker)
            case ["breaks"]:
                return cluster.break_stream(worker)
            case ["returns"]:
                return cluster.attach(worker)
            case ["stops"]:
                worker.stopped = True
            case ["hides"]:
                worker.refuses = True
            case ["shows"]:
                worker.refuses = False
            case ["goes-on"]:
                worker.stopped = False
            case ["device", device, "sickens" | "recovers"]:
                worker.unwell = {device} if words[3] == "sickens" else set()
            case ["unregisters"]:
                return cluster.lease_gone(name)
            case ["registers"]:
                return cluster.register(worker)
            case ["rank", device, "exits"]:
                suspects = tuple(options["suspects"].split(",")) if "suspects" in options else ()
                return cluster.rank_exits(worker, device, suspects)
            case ["respawns"]:
                return cluster.rank_comes_up(worker)
            case ["answers", *count]:
                return [e for _ in range(int(count[0]) if count else 1) for e in cluster.answer_next(worker)]
            case ["fails", replica, phase]:
                fault = ReasonKind[options.get("kind", "GROUP_FAILED")]
                if worker.inbox and isinstance(worker.inbox[0], LoadReplica):
                    worker.inbox.popleft()
                return cluster.group(worker, ReplicaId(replica), GroupPhase[phase], fault)
            case ["load", replica]:
                worker.loads[ReplicaId(replica)] = {key: float(value) for key, value in options.items()}
            case ["leaves", seconds]:
                worker.draining = True
                reason = Reason(kind=ReasonKind.DRAINING, text="asked to stop")
                return cluster.say(worker, Leaving(deadline_ms=round(float(seconds) * 1000), reason=reason))
            case ["fences", term]:
                return cluster.say(worker, Fenced(frame="AssignBatch", highest_term=Term(int(term))))
            case ["drained"]:
                return cluster.say(worker, Drained())
            case _:
                raise ValueError(words)
        return []

    def _gateway(self, words: list[str], options: dict[str, str]) -> list[Effect]:
        cluster, name = self.cluster, GatewayId(words[0])
        if words[1] == "joins":
            journals = tuple(_journal(word) for word in words[2:])
            if name in cluster.gateways:
                return cluster.open_gateway(cluster.gateways[name], journals)
            effects: list[Effect] = []
            cluster.add_gateway(name, journals, effects)
            return effects
        peer = cluster.gateways[name]
        match words[1]:
            case "routes":
                return cluster.tell(peer, RouteBatch(entries=tuple(_entry(word, options) for word in words[2:])))
            case "ends":
                return cluster.tell(peer, EndBatch(entries=tuple(_ended(word) for word in words[2:])))
            case "breaks":
                return cluster.close_gateway(peer)
            case _:
                raise ValueError(words)

    def _admin(self, words: list[str], options: dict[str, str]) -> list[Effect]:
        self.asks += 1
        match words[0]:
            case "drain":
                deadline_ms = round(float(options.get("deadline", 0)) * 1000)
                body: Any = DrainAsked(NodeId(words[1]), deadline_ms)
            case "undrain":
                body = UndrainAsked(NodeId(words[1]))
            case "cancel":
                body = CancelAsked(RequestId(words[1]))
            case "apply":
                body = ApplyAsked(_deployment(words, options))
            case _:
                raise ValueError(words)
        return self.cluster.step(AdminAsked(AskId(self.asks), body))

    def _etcd(self, words: list[str], options: dict[str, str]) -> list[Effect]:
        match words[0]:
            case "mute":
                self.cluster.etcd_up = False
                return self.cluster.step(LeaseMuted())
            case "heard":
                self.cluster.etcd_up = True
                return self.cluster.step(LeaseHeard())
            case "down" | "up":
                self.cluster.etcd_up = words[0] == "up"
                return []
            case "writes":
                return [e for _ in range(len(self.cluster.writes)) for e in self.cluster.write_next()]
            case "revokes":
                return [e for _ in range(len(self.cluster.revokes)) for e in self.cluster.revoke_next()]
            case _:
                raise ValueError(words)

    def _probe(self, words: list[str], options: dict[str, str]) -> list[Effect]:
        return [e for _ in range(len(self.cluster.probes)) for e in self.cluster.probe_next()]

    def _settle(self, words: list[str], options: dict[str, str]) -> list[Effect]:
        return self.cluster.settle()

    def _tick(self, words: list[str], options: dict[str, str]) -> list[Effect]:
        seconds = float(options["every"]) if "every" in options else None
        return [e for _ in range(int(words[0]) if words else 1) for e in self.cluster.tick(seconds)]

    def _new(self, words: list[str], options: dict[str, str]) -> list[Effect]:
        self.cluster = self.cluster.successor()
        return self.cluster.load()

    # ------------------------------------------------------------ effects

    def show(self, effect: Effect) -> str:
        match effect:
            case SendWorker(connection, body):
                peers = [worker.node for worker in self.cluster.workers.values() if worker.connection == connection]
                return f"-> {peers[0] if peers else f'#{connection}'} {show_body(body)}"
            case SendGateway(connection, body):
                if isinstance(body, LeaderHeartbeat):
                    return ""
                names = [peer.gateway for peer in self.cluster.gateways.values() if peer.connection == connection]
                return f"-> {names[0] if names else f'#{connection}'} {show_body(body)}"
            case CloseConnection(connection, reason):
                return f"close #{connection} {show_reason(reason)}"
            case Probe():
                return f"probe {effect.node} {effect.address}"
            case RevokeLease():
                return f"etcd revoke {effect.node} lease {effect.lease_id}"
            case WritePlacement(_, record):
                members = " ".join(f"{member.node}/{member.device}" for member in record.members)
                return f"etcd put {record.replica}@{record.epoch} [{members}]"
            case DeletePlacement():
                return f"etcd delete {effect.replica}"
            case WriteDeployment():
                return f"etcd put deployment {effect.record.deployment} replicas={effect.record.replicas}"
            case DeleteDeployment():
                return f"etcd delete deployment {effect.deployment}"
            case StepDown():
                pause = f" for {effect.pause_s:g} s" if effect.pause_s else ""
                return f"STEP DOWN{pause} below term {effect.highest_term}: {show_reason(effect.reason)}"
            case AdminAnswered():
                return "answer " + (show_reason(effect.error) if effect.error else "ok")
            case Recorded():
                return _show_record(effect)
            case _:
                raise AssertionError(effect)


def _show_record(record: Recorded) -> str:
    where = f" {record.replica}@{record.epoch}" if record.replica else ""
    node = f" {record.node}" if record.node else ""
    request = f" {record.request}" if record.request else ""
    reason = f" {show_reason(record.reason)}" if record.reason else ""
    return f"* {record.name}{node}{where}{request}{reason}"


def show_reason(reason: Reason) -> str:
    return f"{reason.kind.name} ({reason.text})"


def show_body(body: Any) -> str:
    """A frame in a few words."""
    name = type(body).__name__
    match body:
        case AssignBatch():
            return "Assign " + " ".join(_permit(permit) for permit in body.permits)
        case RoutedBatch():
            routed = [_permit(one.permit) for one in body.routed]
            refused = [
                f"{one.request}.{one.attempt} refused {one.code.name} {show_reason(one.reason)}"
                + (f" retry in {one.retry_ms} ms" if one.retry_ms else "")
                for one in body.refused
            ]
            return "Routed " + "; ".join(routed + refused)
        case ReplicaTable():
            rows = " ".join(f"{row.replica}@{row.epoch}:{row.phase.name}" for row in body.rows)
            workers = " ".join(f"{'-' if one.gone else '+'}{one.node}" for one in body.workers)
            return " ".join(filter(None, ("Table" if body.full else "Rows", rows, workers)))
        case LoadReplica():
            return f"{name} {body.replica}@{body.epoch}{_sources(body.sources)}"
        case PreloadWeights():
            return f"{name} {body.device} rank {body.rank} of {body.spec.deployment}{_sources(body.sources)}"
        case _:
            pass
    target = f" {body.replica}@{body.epoch}" if hasattr(body, "replica") else ""
    reason = f" {show_reason(body.reason)}" if getattr(body, "reason", None) else ""
    suspects = f" suspects {','.join(body.suspects)}" if getattr(body, "suspects", ()) else ""
    return f"{name}{target}{reason}{suspects}"


def _sources(sources: tuple[WeightSource, ...]) -> str:
    return " from " + " ".join(one.address for one in sources) if sources else ""


def _permit(permit: Any) -> str:
    return f"{permit.request}.{permit.attempt}->{permit.replica}@{permit.epoch}" + (" solo" if permit.solo else "")


def _deployment(words: list[str], options: dict[str, str]) -> DeploymentRecord:
    return deployment(
        replicas=int(options["m"]),
        tensor=int(options.get("tp", 1)),
        pipeline=int(options.get("pp", 1)),
        path=options.get("path", "/models/m"),
        elastic="elastic" in words,
        spares=int(options.get("spares", 0)),
    )


def _entry(word: str, options: dict[str, str]) -> RouteEntry:
    request, _, attempt = word.partition(".")
    made = entry(request, attempt=int(attempt or 1))
    fields: dict[str, Any] = {}
    for key, value in options.items():
        match key:
            case "cause":
                fields[key] = RouteCause[value]
            case "exclude":
                replica, _, epoch = value.partition("@")
                fields[key] = (ReplicaEpoch(replica=ReplicaId(replica), epoch=Epoch(int(epoch))),)
            case "prefix":
                fields["prefix_hashes"] = tuple(int(one) for one in value.split(","))
            case "tenant" | "deployment" | "model_path":
                fields[key] = value
            case _:
                fields[key] = int(value)
    return replace(made, **fields)


def _ended(word: str) -> EndEntry:
    request, _, attempt = word.partition(".")
    return EndEntry(request=RequestId(request), attempt=Attempt(int(attempt or 1)), outcome=Outcome.FINISHED, tokens=1)


def _journal(word: str) -> JournalInfo:
    request, replica, epoch = word.split("@")
    name, _, attempt = request.partition(".")
    return JournalInfo(
        phase=JournalPhase.RUNNING,
        replica=ReplicaId(replica),
        epoch=Epoch(int(epoch)),
        entry=entry(name, attempt=int(attempt or 1)),
    )
