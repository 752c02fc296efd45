"""Every part of a step that the CPU profile tells of is found where it is timed, and left as it was."""

from __future__ import annotations

from pathlib import Path

import torch

from dataplane.models.cpu_layers import CpuNorm
from tests.support.models import tiny_model
from tools.bench import profile_cpu
from tools.bench.start import start


def test_a_step_is_taken_apart(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, "gemma3_text")
    started = start(folder, torch.device("cpu"), dtype="float32", kv_cache_tokens=1024)
    forward = CpuNorm.forward
    profile_cpu.start_decoding(started.engine, started.model, 1)
    parts = profile_cpu.parts_ms(started.engine, started.model, 3)
    assert all(ms > 0 for ms in parts.values()), parts
    assert CpuNorm.forward is forward


def test_an_inner_part_does_not_count_twice() -> None:
    clock = profile_cpu.Clock()
    inner = clock.around(lambda *_: "inner", lambda: sum(range(100_000)))
    outer = clock.around(lambda *_: "outer", inner)
    outer()
    assert 0 < clock.seconds["outer"] < clock.seconds["inner"]
