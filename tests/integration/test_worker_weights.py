"""Weights ahead of need and from living ranks: a real daemon and real ranks with a tiny model, its leader played."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from controlplane.runtime.ids import DeploymentId, Epoch, ReplicaId
from controlplane.runtime.messages.common import ReplicaSpec, Sampling
from controlplane.runtime.messages.weights import HeldWeights, PreloadWeights, WeightSource, WeightsState
from dataplane.rank_pool import RANK_ENTRY
from tests.support.models import blank_weights, tiny_model
from tests.support.worker import Stage
from tests.support.worker_peers import REPLICA, PlayedGateway
from tests.unit.dataplane.engine.reference import greedy

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

START_S = 180.0
"""Bound on the start of a rank, whose zygote imports torch first."""

PROMPT = [5, 17, 99, 300, 4, 4, 23, 8]
TOKENS = 12
SAMPLING = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)


async def held(played: Stage, device: str) -> HeldWeights:
    """What the device's rank says that it holds."""
    told = await played.leader.told(WeightsState, lambda state: state.device == device and state.held is not None)
    assert told.held is not None
    return told.held


async def tokens(gateway: PlayedGateway, replica: ReplicaId, epoch: Epoch) -> list[int]:
    request = await gateway.open(PROMPT, epoch, replica=replica, sampling=SAMPLING)
    return await gateway.finish_of(request.choices[0].slot)


async def test_a_spare_serves_what_it_loaded_ahead_and_others_copy_from_it(played: Stage, tmp_path: Path) -> None:
    """Once the spare holds the model, its file has other values: whatever is read again shows in the tokens."""
    path = tiny_model(tmp_path, "llama")
    wanted = greedy(path, PROMPT, TOKENS)
    spec = ReplicaSpec(deployment=DeploymentId("d"), model_path=str(path), kv_cache_tokens=2048, cpu_threads=1)
    worker = await played.worker(devices="cpu:0,cpu:1", entry=RANK_ENTRY)
    for device in ("cpu:0", "cpu:1"):
        await played.leader.idle_rank(worker.node, device, START_S)
    await played.leader.send(PreloadWeights(device="cpu:0", rank=0, spec=spec))
    spare = await held(played, "cpu:0")
    kept = path / "model.safetensors"
    values = kept.read_bytes()
    times = kept.stat()
    blank_weights(path)
    epoch = await played.leader.bring_up({"cpu:0": worker.node}, spec=spec)
    gateway = await played.gateway(worker)
    assert await tokens(gateway, REPLICA, epoch) == wanted
    restore(kept, values, times.st_atime_ns, times.st_mtime_ns)
    source = WeightSource(degrees=spare.degrees, rank=spare.rank, address=spare.address)
    second = ReplicaId("tiny-1")
    epoch = await played.leader.bring_up({"cpu:1": worker.node}, second, spec, (source,))
    newcomer = await held(played, "cpu:1")
    assert newcomer.fingerprint == spare.fingerprint
    assert newcomer.address != spare.address
    assert await tokens(gateway, second, epoch) == wanted
    assert f"{spare.address}=" in logs(tmp_path), "the newcomer asked the spare"


def logs(folder: Path) -> str:
    """All that daemon and ranks logged."""
    return "".join(log.read_text() for log in folder.rglob("*.log"))


def restore(path: Path, values: bytes, read_ns: int, written_ns: int) -> None:
    """The file as it was, its times included."""
    path.write_bytes(values)
    os.utime(path, ns=(read_ns, written_ns))
