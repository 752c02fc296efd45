"""Fast modules take the place of what they compute, in the families that compute it, and give the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ReplicaSpec
from dataplane.engine.attention import running
from dataplane.engine.kv_cache import KVCache
from dataplane.models.fit import FittedModel, load_model
from dataplane.parallel.mesh import Mesh
from tests.support.models import FAMILIES, tiny_model
from tests.unit.dataplane.kernels.conftest import device as device

pytestmark = pytest.mark.gpu

TOKENS, PAGE = 21, 16

# (attention modules, feed-forward modules, layers) that are replaced, of four.
WANTED = {
    "llama": (4, 4, 4),
    "mistral": (4, 4, 4),
    "qwen2": (4, 4, 4),
    "qwen3": (4, 4, 4),
    "gemma2": (4, 4, 0),
    "gemma3_text": (4, 4, 0),
    "mixtral": (4, 0, 4),
    "qwen3_moe": (4, 1, 4),
    "granite": (4, 4, 0),
    "phi3": (0, 4, 0),
    "gpt_oss": (0, 0, 0),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_stay(device: torch.device, tmp_path: Path, family: str) -> None:
    from dataplane.models.accelerate import accelerate
    from dataplane.models.fast_layers import GpuKit

    spec = ReplicaSpec(deployment=DeploymentId("d"), model_path=str(tiny_model(tmp_path, family)), dtype="float32")
    model = load_model(spec, Mesh.single(), device, lambda *_: None)
    before = logits(model, device)
    done = accelerate(model.module, GpuKit(64), whole=True)
    if family in WANTED:
        assert (done.attention, done.feed_forward, done.layers) == WANTED[family]
    after = logits(model, device)
    assert float((after - before).norm() / before.norm()) < 1e-5


def logits(model: FittedModel, device: torch.device) -> torch.Tensor:
    """Of a prompt, through the GPU's attention."""
    from dataplane.engine.arrangement import Runs, arrange
    from dataplane.engine.attention_cuda import CudaAttentionStep, DeviceWork, Kind
    from dataplane.kernels.prefill import queries_a_tile

    cache = KVCache(model.attention, 2, PAGE, model.dtype, device)
    one = np.zeros(1, dtype=np.int64)

    def work(kind: Kind) -> DeviceWork:
        queries = queries_a_tile(kind.heads // kind.kv_heads)
        made = arrange(Runs(one, one + TOKENS, one, one, TOKENS), kind.window, 0, queries, may_be_dense=False)
        parts = (torch.from_numpy(part).to(device, torch.int32) for part in (made.items, made.merges, made.tiles))
        return DeviceWork(*parts)

    tables = torch.arange(2, dtype=torch.int32, device=device)
    slots = torch.arange(TOKENS, dtype=torch.int32, device=device)
    step = CudaAttentionStep(cache, slots, tables, work)
    ids = ((torch.arange(TOKENS, device=device) * 7 + 3) % 323).to(torch.int32)
    lengths = torch.full((TOKENS,), TOKENS, device=device) if model.needs_rope_lengths else None
    with torch.inference_mode(), running(step):
        return model.forward(ids, None, slots, slice(None), lengths)
