"""What the ranks of the engine's mesh tests do. Each function runs on every rank; see tests/support/ranks.py."""

from __future__ import annotations

from typing import Any

import torch

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaSpec, Sampling
from dataplane.engine.engine import Engine
from dataplane.engine.follower import Follower
from dataplane.engine.library import generate, submission
from dataplane.models.fit import load_model
from tests.support.ranks import Ranks

CPU = torch.device("cpu")


def answers(ranks: Ranks, paths: list[str], prompts: list[list[int]], degrees: dict[str, int], count: int) -> Any:
    """Greedy tokens by model, from the driver; the other ranks follow until it ends the mesh."""
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
        model = load_model(spec, mesh, CPU, lambda *_: None)
        if ranks.rank == 0:
            engine = Engine(model, spec, CPU)
            sampling = Sampling(temperature=0, max_tokens=count, ignore_eos=True)
            submissions = [submission(n, prompt, sampling) for n, prompt in enumerate(prompts)]
            told[path] = [answer.tokens for answer in generate(engine, submissions)]
            engine.close()
        else:
            Follower(model, spec, CPU, None, lambda *_: None).run()
        mesh.close()
    return told
