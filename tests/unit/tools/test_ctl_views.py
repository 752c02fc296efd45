"""What `perdure ctl` prints, from what Admin answers."""

from __future__ import annotations

import io
import json

from rich.console import Console, RenderableType

from protos.perdure.v1 import admin_pb2, common_pb2, session_pb2
from tools.ctl import tables, views


def status() -> admin_pb2.StatusResponse:
    rank = session_pb2.RankInfo(
        device="cpu:0",
        pid=31,
        phase=common_pb2.RANK_PHASE_SERVING,
        replica="main-0",
        epoch=4,
        rank=0,
        held=session_pb2.HeldWeights(deployment="main", degrees=common_pb2.ParallelDegrees(tensor=2), rank=1),
    )
    reason = common_pb2.Reason(kind=common_pb2.REASON_KIND_SESSION_SILENT)
    return admin_pb2.StatusResponse(
        cluster="lab",
        answered_by="cp-1",
        leader=admin_pb2.LeaderStatus(
            id="cp-0", pid=11, address="10.0.0.1:7700", term=3, phase=admin_pb2.LEADER_PHASE_FROZEN
        ),
        nodes=[
            admin_pb2.NodeStatus(id="w0", host="a", pid=21, phase=admin_pb2.NODE_PHASE_LIVE, ranks=[rank]),
            admin_pb2.NodeStatus(id="w1", host="b", pid=22, phase=admin_pb2.NODE_PHASE_UNREACHABLE, reason=reason),
        ],
        replicas=[
            admin_pb2.ReplicaStatus(
                id="main-0",
                phase=common_pb2.REPLICA_PHASE_LOADING,
                epoch=4,
                running=2,
                waiting=1,
                free_blocks=90,
                total_blocks=100,
                members=[common_pb2.Member(rank=0, node="w0", device="cpu:0", host="a")],
                load_fraction=0.25,
                load_stage="weights",
                degrees=common_pb2.ParallelDegrees(tensor=2, pipeline=1, data=1, expert=1),
            )
        ],
        gateways=[admin_pb2.GatewayStatus(id="cp-0", pid=11, url="http://a:8000", open_requests=3)],
        deployments=[admin_pb2.DeploymentStatus(id="main", model="m", replicas=1, spares=3, spares_ready=1)],
        fenced=[admin_pb2.FencedCount(frame="Assign", count=7)],
    )


def printed(content: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(content)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_status_as_programs_read_it() -> None:
    view = json.loads(json.dumps(views.status_view(status())))
    assert view["leader"] == {"id": "cp-0", "pid": 11, "address": "10.0.0.1:7700", "term": 3, "state": "frozen"}
    assert [(node["id"], node["host"], node["pid"], node["state"]) for node in view["nodes"]] == [
        ("w0", "a", 21, "live"),
        ("w1", "b", 22, "unreachable"),
    ]
    assert view["nodes"][0]["ranks"] == [
        {
            "rank": 0,
            "pid": 31,
            "device": "cpu:0",
            "state": "serving",
            "replica": "main-0",
            "epoch": 4,
            "holds": "rank 1 of main",
        }
    ]
    replica = view["replicas"][0]
    assert {key: replica[key] for key in ("id", "state", "epoch", "running", "waiting", "free_blocks", "tensor")} == {
        "id": "main-0",
        "state": "loading",
        "epoch": 4,
        "running": 2,
        "waiting": 1,
        "free_blocks": 90,
        "tensor": 2,
    }
    assert view["gateways"] == [{"id": "cp-0", "pid": 11, "url": "http://a:8000", "open_requests": 3}]
    assert view["fenced"] == {"Assign": 7}


def test_status_without_a_leader() -> None:
    answer = status()
    answer.ClearField("leader")
    view = views.status_view(answer)
    assert view["leader"] is None
    assert "no leader (answered by cp-1)" in printed(tables.status_tables(view))


def test_status_as_people_read_it() -> None:
    text = printed(tables.status_tables(views.status_view(status())))
    assert "leader cp-0 (pid 11, 10.0.0.1:7700), term 3, frozen" in text
    assert "main-0 @ 4" in text
    assert "rank 1 of main" in text
    assert "tp 2 · pp 1 · ep 1" in text
    assert "1 of 3" in text
    assert "loading 25% weights" in text
    assert "session silent" in text
    assert "frames refused as stale: 7 Assign" in text


def test_an_event_is_one_line() -> None:
    event = admin_pb2.EventsResponse(
        wall_ms=1_700_000_000_123,
        name="replica_closed",
        replica="main-0",
        epoch=4,
        reason=common_pb2.Reason(kind=common_pb2.REASON_KIND_PROCESS_EXITED, text="rank 0 was killed"),
        details={"requests": "2"},
    )
    line = printed(tables.event_line(views.event_view(event)))
    assert line.rstrip().endswith(".123 replica_closed  replica main-0, epoch 4, requests 2  (rank 0 was killed)")


def test_a_state_from_a_newer_cluster_is_its_number() -> None:
    assert views.enum_word(admin_pb2.NodeStatus(phase=99), "phase") == "99"  # type: ignore[arg-type]


def test_failures_show_each_step_and_what_is_still_to_come() -> None:
    closed = admin_pb2.FailureStep(phase=admin_pb2.FAILURE_PHASE_CLOSED, after_ms=0)
    first_token = admin_pb2.FailureStep(phase=admin_pb2.FAILURE_PHASE_FIRST_TOKEN, after_ms=85)
    reason = common_pb2.Reason(kind=common_pb2.REASON_KIND_PROCESS_EXITED, text="killed by signal 9")
    failure = admin_pb2.FailureStatus(
        age_ms=1500, replica="main-0", epoch=4, reason=reason, steps=[closed, first_token], requests=16, silent=2
    )
    (row,) = views.failures_view(admin_pb2.ListFailuresResponse(failures=[failure]))
    assert row["steps_ms"] == {"closed": 0, "fenced": None, "regrouped": None, "replayed": None, "first_token": 85}
    line = printed(tables.failures_table([row])).splitlines()[1]
    for cell in ("main-0 @ 4 → ?", "0 ms", "85 ms", "16 (2 wait)", "killed by signal 9"):
        assert cell in line
