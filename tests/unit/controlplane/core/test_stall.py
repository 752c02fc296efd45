"""What counts as standing still: time in which the ranks could have moved, by their own nodes' clocks."""

from __future__ import annotations

from controlplane.core.stall import Stall
from controlplane.runtime.ids import Epoch, NodeId, ReplicaId
from controlplane.runtime.messages.session import ReplicaLoad

DRIVER, PEER = NodeId("w1"), NodeId("w2")


def load(progress: int, *, starved_ms: int = 0, running: int = 1) -> ReplicaLoad:
    return ReplicaLoad(
        replica=ReplicaId("m-0"),
        epoch=Epoch(1),
        free_blocks=1,
        running=running,
        waiting=0,
        progress=progress,
        starved_ms=starved_ms,
    )


def told(stall: Stall, uptime_ms: int, driver: ReplicaLoad, peer: ReplicaLoad | None = None) -> float:
    """A heartbeat of rank 0's node, and perhaps of the other; how long it stands still then."""
    if peer is not None:
        stall.told(PEER, peer, uptime_ms + 700_000)
    stall.told(DRIVER, driver, uptime_ms)
    stall.heard(driver)
    return stall.seconds


def test_time_without_a_move_counts_and_a_move_ends_it() -> None:
    stall = Stall()
    assert told(stall, 90_000, load(7)) == 0, "what was before the first heartbeat is unknown"
    assert told(stall, 90_500, load(7)) == 0.5
    assert told(stall, 92_000, load(7)) == 2
    assert told(stall, 92_500, load(8)) == 0


def test_without_work_nothing_stands_still() -> None:
    stall = Stall()
    told(stall, 1000, load(7))
    assert told(stall, 9000, load(7, running=0)) == 0
    assert told(stall, 9500, load(7)) == 0.5


def test_starved_time_does_not_count() -> None:
    stall = Stall()
    told(stall, 1000, load(7, starved_ms=300))
    assert told(stall, 11_000, load(7, starved_ms=9900)) == 0.4
    assert told(stall, 12_000, load(7, starved_ms=9900)) == 1.4, "it could have moved meanwhile"


def test_one_starved_node_holds_all_ranks_up() -> None:
    stall = Stall()
    told(stall, 1000, load(7), load(0, starved_ms=50))
    assert told(stall, 4000, load(7, starved_ms=100), load(0, starved_ms=2950)) == 0.1, "nodes starve side by side"


def test_a_silent_node_lets_no_time_pass() -> None:
    stall = Stall()
    told(stall, 1000, load(7), load(0))
    assert told(stall, 16_000, load(7)) == 0
    assert told(stall, 16_500, load(7), load(0, starved_ms=15_000)) == 0.5, "its machine stood still"
    assert told(stall, 18_500, load(7), load(0, starved_ms=15_000)) == 2.5


def test_what_starved_before_it_moved_excuses_nothing() -> None:
    stall = Stall()
    told(stall, 1000, load(7))
    told(stall, 6000, load(8, starved_ms=5000))
    assert told(stall, 8000, load(8, starved_ms=5000)) == 2


def test_a_new_start_forgets_what_was() -> None:
    stall = Stall()
    told(stall, 1000, load(7))
    told(stall, 2900, load(7))
    stall.restart()
    assert stall.seconds == 0
    assert told(stall, 3900, load(7)) == 1


def test_a_heartbeat_that_is_overtaken_does_no_harm() -> None:
    stall = Stall()
    told(stall, 2000, load(8, starved_ms=500))
    assert told(stall, 1000, load(8, starved_ms=100)) == 0
