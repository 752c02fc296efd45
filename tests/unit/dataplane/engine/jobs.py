"""What the ranks of the engine's mesh tests do. Each function runs on every rank; see tests/support/ranks.py."""

from __future__ import annotations

from typing import Any

import torch

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaSpec, Sampling
from dataplane.engine.library import submission
from dataplane.engine.replicas import Replicas
from dataplane.models.fit import load_model
from tests.support.ranks import Ranks

CPU = torch.device("cpu")


def answers(ranks: Ranks, paths: list[str], prompts: list[list[int]], degrees: dict[str, int], count: int) -> Any:
    """Greedy tokens by model."""
    told: dict[str, list[list[int]]] = {}
    for path in paths:
        mesh = ranks.mesh(**degrees)
        spec = ReplicaSpec(
            deployment=DeploymentId("d"),
            model_path=path,
            degrees=ParallelDegrees(**degrees),
            # In chunks, with sequences preempted.
            kv_cache_tokens=384,
            max_batch_tokens=48,
            max_sequences=6,
            max_model_tokens=300,
        )
        replicas = Replicas(load_model(spec, mesh, CPU, lambda *_: None), spec, CPU)
        sampling = Sampling(temperature=0, max_tokens=count, ignore_eos=True)
        generated = replicas.generate([submission(n, prompt, sampling) for n, prompt in enumerate(prompts)])
        assert generated is not None
        told[path] = [answer.tokens for answer in generated]
        replicas.close()
        mesh.close()
    return told
