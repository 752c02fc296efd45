"""Deliberate bugs and the worlds in which they should show. `python -m tests.sim.mutants` counts the seeds that each
takes.

Those named in PROTOCOL §9 and in the simulator's own list of duties bear the names that they have there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.sim import bugs_leader as leader
from tests.sim import bugs_peers as peers
from tools.sim.faults import KINDS, Fault, draw_schedule
from tools.sim.run import FAULTS_S, Outcome, run_seed
from tools.sim.world import Shape

SMALL = Shape(control_planes=2, workers=2, devices=1, replicas=2)
PLAIN = Shape()
WARM_S = 5.0
PATIENCE_S = 30.0
"""The faults that bring mutants out are few: without the mutant all is well long before."""
SEEDS_MAX = 12


@dataclass(frozen=True, slots=True)
class Mutant:
    """`apply` makes the bug; `faults` are kinds that should bring it out, drawn by seed, or the faults themselves."""

    name: str
    apply: Callable[[pytest.MonkeyPatch], None]
    faults: tuple[str, ...] | list[Fault]
    shape: Shape = SMALL
    # Seeds that it takes to find it, counted from 0 on.
    seeds: int = 1

    def run(self, seed: int) -> Outcome:
        """The seed's world; the bug must be in place."""
        return run_seed(seed, self._schedule(seed), self.shape, PATIENCE_S)

    def _schedule(self, seed: int) -> list[Fault]:
        if isinstance(self.faults, list):
            return self.faults
        kinds = tuple(kind for kind in KINDS if kind.name in self.faults)
        control_planes = [f"cp{n}" for n in range(1, self.shape.control_planes + 1)]
        hosts = control_planes, [f"w{n}" for n in range(1, self.shape.workers + 1)]
        return draw_schedule(seed, hosts, self.shape.devices, WARM_S, WARM_S + FAULTS_S, kinds) if kinds else []


RESTORED = [
    Fault(7.0, "etcd_snapshot"),
    Fault(8.0, "kill", "leader", lasts=1.0),
    Fault(12.0, "cut_etcd", "w2", lasts=3.0),
    Fault(12.5, "kill", "cp1", lasts=1.5),
    Fault(12.5, "kill", "cp2", lasts=1.5),
    Fault(13.0, "etcd_restore"),
]
"""Nobody who stands for election knows of the term that was led last."""
OLD_LEADER = [
    *(Fault(7.0, "cut_etcd", name, lasts=9.0) for name in ("leader", "w1", "w2")),
    *(Fault(10.0 + 0.2 * turn, "burst", value=6.0) for turn in range(20)),
]
"""The leader and the workers are cut off from etcd, where another is elected: its gateway tells the workers."""
HEARD_OF_ANOTHER = [*OLD_LEADER, *(Fault(10.0 + 1.5 * turn, "break", f"w{1 + turn % 2}") for turn in range(4))]
"""Each new stream of a gateway tells its worker of the other leader again."""
LATE_BODIES = [
    *OLD_LEADER,
    *(Fault(9.0, "slow", name, 0.3, 7.0) for name in ("cp1", "cp2")),
]
LATE_FOR_AN_EPOCH = [
    Fault(6.0, "slow", "cp2", 0.5, 14.0),
    *(Fault(7.0 + turn, "rank_crash", f"w{1 + turn % 2}/cpu:0") for turn in range(10)),
    *(Fault(7.0 + 0.2 * turn, "burst", value=6.0) for turn in range(50)),
]
"""Bodies are on their way while their replica falls and comes up again."""

PAUSES = [
    *(Fault(6.0 + 3.5 * turn, "pause", f"w{1 + turn % 2}", lasts=2.6) for turn in range(5)),
    *(Fault(6.0 + 0.4 * turn, "burst", value=3.0) for turn in range(45)),
]
"""Too short for a lease, longer than a replica with work may stand still."""

WITHOUT_NODES = [*(Fault(6.0, "lose_machine", name, lasts=9.0) for name in ("w1", "w2")), Fault(18.0, "break", "w3")]
IN_PARTS = [
    Fault(3.0, "scale", value=3.0),
    Fault(8.0, "lose_machine", "w2", lasts=34.0),
    Fault(34.0, "forks_fail", lasts=5.0),
    Fault(34.2, "rank_crash", "w1/cpu:1"),
    Fault(46.0, "break", "w2"),
]
"""Two replicas shrink onto a device each, since one of the two comes back late; then two more devices come."""
LATE_TOKENS = [
    *(Fault(7.5 + 4 * turn, "slow", f"w{1 + turn % 2}", 0.3, 3.5) for turn in range(4)),
    *(Fault(8.0 + 4 * turn, "drain", f"w{1 + turn % 2}", lasts=2.0) for turn in range(4)),
    *(Fault(7.8 + turn, "burst", value=8.0) for turn in range(16)),
]
"""Tokens are on their way while their requests are moved."""

UNPLUGGED = [
    Fault(9.9, "burst", value=40.0),
    Fault(10.0, "unplug", "w1", lasts=9.0),
    *(Fault(11.5, "kill", name, lasts=2.0) for name in ("cp1", "cp2")),
    Fault(26.0, "burst", value=1.0),
]
"""A worker is away for longer than its lease, and so are the gateways whose streams it holds."""
SPARE = Shape(control_planes=2, workers=3, devices=1, replicas=1, spares=1)
UNPLUGGED_SHAPE = Shape(control_planes=3, workers=3, devices=1, replicas=3)
ELASTIC = Shape(control_planes=1, workers=3, devices=1, replicas=1, tensor=2, elastic=1)
PARTS = Shape(control_planes=1, workers=2, devices=2, replicas=1, tensor=2, pipeline=2, elastic=1)

MUTANTS = (
    # the leader
    Mutant("skip grace", leader.skip_grace, ("stop", "lose_machine", "isolate"), seeds=5),
    Mutant("revoke on silence", leader.revoke_on_silence, ("stop", "break"), PLAIN),
    Mutant("proof from one refusal", leader.one_refusal_is_proof, ("reject_break",), PLAIN),
    Mutant("lease loss closes a live node", leader.lease_loss_kills, ("revoke_lease",), PLAIN),
    Mutant("judging right after a pause", leader.judge_after_pause, ("stop",), Shape(1, 2, 1, 2)),
    Mutant("FROZEN leader revokes", leader.frozen_leader_revokes, ("etcd_down", "kill"), seeds=4),
    Mutant("epoch reuse", leader.epoch_reuse, ("rank_crash", "kill")),
    Mutant(
        "epoch from a restored etcd",
        leader.epoch_of_a_restored_store,
        ("etcd_snapshot", "rank_crash", "etcd_restore", "kill"),
        seeds=2,
    ),
    Mutant("Form before the epoch is written", leader.form_before_written, ()),
    Mutant("guard by create-revision", leader.guard_by_create_revision, ("kill",)),
    Mutant("term not raised", leader.term_not_raised, ("kill",)),
    Mutant("stale placement", leader.stale_placement, ("rank_crash", "scale", "leave"), PLAIN),
    Mutant("shrunk for ever", leader.shrunk_for_ever, WITHOUT_NODES, ELASTIC),
    Mutant("parts are never gathered", leader.parts_never_gathered, IN_PARTS, PARTS),
    Mutant("a spare is free twice", leader.spare_free_twice, ("rank_crash", "scale"), SPARE),
    Mutant("a spare's answer is ignored", leader.spare_answers_ignored, (), SPARE),
    Mutant("a lost node is taken for dead", leader.lost_is_dead, UNPLUGGED, UNPLUGGED_SHAPE, seeds=2),
    Mutant("credit leak", leader.credit_leak, ()),
    Mutant("queue miscounted", leader.queue_miscounted, ("burst",), seeds=2),
    Mutant("an end is forgotten", leader.end_forgotten, ()),
    Mutant("a request is written to etcd", leader.request_in_etcd, ()),
    # gateways
    Mutant("double delivery", peers.double_delivery, ("break",)),
    Mutant("forget on failover", peers.forget_on_failover, ("kill", "break", "burst")),
    Mutant("news of a closed epoch ignored", peers.closed_epoch_ignored, ("rank_crash",)),
    Mutant("bump without key", peers.bump_without_key, ("rank_crash",)),
    Mutant("retry without budget", peers.retry_without_budget, ("rank_crash", "burst"), seeds=9),
    Mutant("retry of a poison request", peers.poison_retried, ("poison",)),
    Mutant("slot reused", peers.slot_reused, ()),
    Mutant("skip fencing: an old attempt's tokens count", peers.old_attempt_counts, LATE_TOKENS),
    Mutant("a new leader's doubt is ignored", peers.leader_without_doubt, UNPLUGGED, UNPLUGGED_SHAPE, seeds=2),
    # workers and engines
    Mutant("skip fencing: an old leader is obeyed", peers.old_leader_obeyed, HEARD_OF_ANOTHER),
    Mutant("skip fencing: a permit of an old term runs", peers.old_term_runs, LATE_BODIES, seeds=8),
    Mutant("skip fencing: a permit of an old epoch runs", peers.old_epoch_runs, LATE_FOR_AN_EPOCH),
    Mutant("skip fencing: two leaders of a term", peers.two_leaders_of_a_term, RESTORED),
    Mutant("shadows never ended", peers.shadows_never_ended, ()),
    Mutant("shadows not kept", peers.orphans_dropped, ("kill",)),
    Mutant("finish apart from its token", peers.finish_without_its_token, ()),
    Mutant("Sync ignored", peers.sync_ignored, ("break",)),
    Mutant("a pause is a hang", peers.pauses_are_hangs, PAUSES, seeds=2),
    Mutant("block leak", peers.block_leak, ()),
)


def hunt(mutant: Mutant, seeds: list[int]) -> tuple[int, str]:
    """How many of `seeds` it takes to find the mutant, and how it shows. (0, "") if none does."""
    with pytest.MonkeyPatch.context() as patch:
        mutant.apply(patch)
        for count, seed in enumerate(seeds, 1):
            outcome = mutant.run(seed)
            if not outcome.ok:
                return count, outcome.error
    return 0, ""


def main(words: list[str]) -> None:
    for mutant in MUTANTS:
        if not all(word in mutant.name for word in words):
            continue
        count, error = hunt(mutant, list(range(SEEDS_MAX)))
        print(f"{mutant.name:<44} {count or '-':>3}  {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
