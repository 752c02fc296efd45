"""An engine in this process, and what it does with lists of requests."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from controlplane.runtime.ids import DeploymentId, Epoch
from controlplane.runtime.messages.common import ReplicaSpec, Sampling
from dataplane.engine.engine import Engine
from dataplane.engine.library import submission
from dataplane.models.fit import FittedModel, load_model
from dataplane.parallel.mesh import Mesh
from tools.bench.workloads import Job, Shape

SEQUENCES = 256
MODEL_TOKENS = 4096
"""Of engines with random weights."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How long a list of requests took. Times in seconds from its submission."""

    seconds: float
    prompt_tokens: int
    answer_tokens: int
    # Of each token after a sequence's first, when a sequence runs alone.
    gaps: list[float]
    first_s: float

    @property
    def answer_rate(self) -> float:
        return self.answer_tokens / self.seconds

    @property
    def prompt_rate(self) -> float:
        return self.prompt_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Started:
    engine: Engine
    model: FittedModel
    # From the first line to the first request accepted.
    seconds: float


def start_shape(shape: Shape, device: torch.device, mesh: Mesh, options: dict[str, object]) -> Started:
    """The driver's engine with random bf16 weights of a shape."""
    begun = time.perf_counter()
    model, spec = load_shape(shape, device, mesh, options)
    engine = Engine(model, spec, device)
    return Started(engine, model, time.perf_counter() - begun)


def load_shape(
    shape: Shape, device: torch.device, mesh: Mesh, options: dict[str, object]
) -> tuple[FittedModel, ReplicaSpec]:
    """A rank's part of random bf16 weights of a shape."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": shape.family, **shape.config, "eos_token_id": 0, "bos_token_id": 0}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        spec = _spec(
            Path(folder),
            dtype="bfloat16",
            load_format="dummy",
            degrees=mesh.degrees,
            max_sequences=SEQUENCES,
            max_batch_tokens=shape.batch_tokens,
            max_model_tokens=MODEL_TOKENS,
            **options,
        )
        return load_model(spec, mesh, device, lambda *_: None), spec


def start(folder: Path, device: torch.device, **options: object) -> Started:
    """An engine for the model in `folder`."""
    begun = time.perf_counter()
    spec = _spec(folder, **options)
    model = load_model(spec, Mesh.single(), device, lambda *_: None)
    engine = Engine(model, spec, device)
    return Started(engine, model, time.perf_counter() - begun)


def _spec(folder: Path, **options: object) -> ReplicaSpec:
    return ReplicaSpec(deployment=DeploymentId("bench"), model_path=str(folder), **options)  # type: ignore[arg-type]


def run_jobs(engine: Engine, jobs: Sequence[Job]) -> Outcome:
    """All jobs at once, on an idle engine with an empty cache."""
    engine.reset(Epoch(0))
    requests = [
        submission(number, job.prompt, Sampling(temperature=0, max_tokens=job.answer_tokens, ignore_eos=True))
        for number, job in enumerate(jobs)
    ]
    begun = time.perf_counter()
    engine.submit(requests)
    arrivals: list[float] = []
    answered = 0
    while engine.has_work:
        done = engine.step()
        if done is not None and done.tokens:
            arrivals.append(time.perf_counter() - begun)
            answered += len(done.tokens) // 4
    seconds = time.perf_counter() - begun
    assert answered == sum(job.answer_tokens for job in jobs), "tokens are missing"
    return Outcome(
        seconds=seconds,
        prompt_tokens=sum(len(job.prompt) for job in jobs),
        answer_tokens=answered,
        gaps=[later - earlier for earlier, later in pairwise(arrivals)],
        first_s=arrivals[0],
    )


def median_outcome(engine: Engine, jobs: Sequence[Job], repeats: int) -> Outcome:
    """The outcome in the middle."""
    outcomes = sorted((run_jobs(engine, jobs) for _ in range(repeats)), key=lambda outcome: outcome.seconds)
    return outcomes[(len(outcomes) - 1) // 2]


def token_ms(outcome: Outcome) -> float:
    """Milliseconds a token after the first, of one request alone."""
    return 1000 * sum(outcome.gaps) / len(outcome.gaps)


def has_gpu() -> bool:
    return torch.cuda.is_available()
