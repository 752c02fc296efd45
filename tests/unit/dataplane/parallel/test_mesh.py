from __future__ import annotations

import time

import pytest
import torch

from controlplane.runtime.errors import PeerLost, Rejected
from controlplane.runtime.messages.common import ParallelDegrees
from dataplane.parallel.mesh import Formation, Mesh, Rendezvous, form_mesh, plan_mesh, world_size


def test_ranks_count_with_the_tensor_axis_fastest_then_pipeline_then_data() -> None:
    degrees = ParallelDegrees(tensor=2, pipeline=3, data=2)
    mesh = plan_mesh(degrees, 9)
    assert world_size(degrees) == 12
    assert (mesh.tensor_rank, mesh.stage, mesh.data.index) == (1, 1, 1)
    assert mesh.tensor.ranks == (8, 9)
    assert mesh.pipeline.ranks == (7, 9, 11)
    assert mesh.data.ranks == (3, 9)
    assert not mesh.is_first_stage
    assert not mesh.is_last_stage


@pytest.mark.parametrize(("expert", "ranks"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (4, [0, 1, 2, 3])])
def test_experts_lie_across_the_tensor_ranks(expert: int, ranks: list[int]) -> None:
    degrees = ParallelDegrees(tensor=4, expert=expert)
    assert [plan_mesh(degrees, rank).expert_rank for rank in range(4)] == ranks


@pytest.mark.parametrize(
    ("degrees", "text"),
    [
        (ParallelDegrees(tensor=2, expert=4), "the expert degree 4 must divide the tensor degree 2"),
        (ParallelDegrees(pipeline=0), "the pipeline degree must be at least 1, not 0"),
    ],
)
def test_degrees_that_no_mesh_can_have_are_refused(degrees: ParallelDegrees, text: str) -> None:
    with pytest.raises(Rejected, match=text):
        world_size(degrees)


def test_a_rank_outside_the_mesh_is_refused() -> None:
    with pytest.raises(Rejected, match="rank 2 is outside a mesh of 2 ranks"):
        plan_mesh(ParallelDegrees(tensor=2), 2)


def test_a_mesh_of_one_has_every_group_by_name() -> None:
    mesh = Mesh.single()
    assert [mesh.group(group.name) for group in mesh.groups] == list(mesh.groups)
    assert mesh.is_first_stage
    assert mesh.is_last_stage


def test_forming_without_a_peer_ends_at_the_deadline() -> None:
    formation = Formation(
        degrees=ParallelDegrees(tensor=2),
        hosts=("127.0.0.1",) * 2,
        nonce="alone",
        epoch=1,
        backend="gloo",
        collective_timeout_s=1.0,
    )
    rendezvous = Rendezvous.listen("127.0.0.1")
    with pytest.raises(PeerLost, match="epoch 1 of 2 ranks could not form"):
        form_mesh(formation, 0, torch.device("cpu"), rendezvous, time.monotonic() + 0.3)


def test_a_rendezvous_that_is_not_there_is_a_lost_peer() -> None:
    with pytest.raises(PeerLost, match=r"no rendezvous at 127\.0\.0\.1:1"):
        Rendezvous.join("127.0.0.1:1", time.monotonic() + 0.3)
