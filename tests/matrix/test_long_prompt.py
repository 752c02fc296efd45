"""A prompt of 32,000 tokens beside short streams, on the demo model: in chunks, in bounded memory, nobody waits."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ReplicaSpec, Sampling
from controlplane.runtime.packing import unpack_u32
from dataplane.engine.engine import Engine
from dataplane.engine.kv_cache import block_bytes
from dataplane.engine.library import submission
from dataplane.models.demo import DEMO_PACKAGE, prepare_demo_model
from dataplane.models.fit import load_model
from dataplane.parallel.mesh import Mesh
from tests.matrix.conftest import Tell
from tests.unit.dataplane.models.jobs import rise_of_memory

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec(DEMO_PACKAGE) is None, reason="the demo model is not installed: the extra `demo`"),
]

LONG = 32_000
STREAMS = 3
CPU = torch.device("cpu")
STEP_BYTES = 512 * 2**20
"""Room for what a step holds besides cache and weights."""


def test_a_long_prompt_leaves_the_others_their_pace(tell: Tell) -> None:
    model = prepare_demo_model(lambda *_: None)
    spec = ReplicaSpec(deployment=DeploymentId("long"), model_path=str(model), dtype="bfloat16", kv_cache_tokens=36_864)
    fitted = load_model(spec, Mesh.single(), CPU, lambda *_: None)
    engine = Engine(fitted, spec, CPU)
    endless = Sampling(temperature=0, max_tokens=4000, ignore_eos=True)
    engine.submit([submission(n, [2, 818, 5279 + n], endless) for n in range(STREAMS)])
    with rise_of_memory() as risen:
        first: dict[int, list[float]] = defaultdict(list)
        _run(engine, first, lambda: len(first) == STREAMS)
        engine.submit([submission(99, [2, *range(1000, 1000 + LONG - 1)], Sampling(temperature=0, max_tokens=2))])
        times: dict[int, list[float]] = defaultdict(list)
        steps = _run(engine, times, lambda: 99 in times)
    gaps = [b - a for n in range(STREAMS) for a, b in zip(times[n], times[n][1:], strict=False)]
    cache = block_bytes(fitted.attention, spec.block_tokens, fitted.dtype) * engine.capacity.total_blocks
    tell(
        f"gemma-3-270m: a prompt of {LONG} tokens in {steps} steps and {times[99][0] - times[0][0]:.0f} s; "
        f"{STREAMS} streams beside it got {len(times[0])} tokens each, longest gap {max(gaps):.2f} s; "
        f"memory rose by {risen() / 2**20:.0f} MiB, the cache is {cache / 2**20:.0f} MiB"
    )
    assert steps > LONG // spec.max_batch_tokens
    # A token in every step for each stream.
    assert all(abs(len(times[n]) - steps) <= 2 for n in range(STREAMS))
    assert risen() < cache + STEP_BYTES


def _run(engine: Engine, times: dict[int, list[float]], until: Callable[[], bool]) -> int:
    """Step until the condition holds; note when each sequence got a token. The steps done."""
    for step in range(1, 100_000):
        done = engine.step()
        for name in unpack_u32(done.sequences) if done is not None else ():
            times[name].append(time.perf_counter())
        if until():
            return step
    raise AssertionError("it never came to that")
