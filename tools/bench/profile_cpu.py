"""A decode step on a CPU, taken apart: what each part of it takes, beside what the hardware needs for its products.

Parts are timed where they are called, each without the parts inside it, so that they add up to the step. The floor of a
product is measured in the same run: reading its weights at the bandwidth of memory, or its arithmetic at the rate of a
large product, whichever takes longer.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import Sampling
from dataplane.engine.attention_cpu import CpuAttentionStep
from dataplane.engine.engine import Engine
from dataplane.engine.library import submission
from dataplane.engine.linear import PackedMatmul
from dataplane.engine.runner import ModelRunner
from dataplane.engine.sampler import Sampler
from dataplane.models import cpu_layers
from dataplane.models.cpu_layers import CpuMLP, CpuNorm
from dataplane.models.fit import FittedModel
from dataplane.parallel.tensor import Linear
from tools.bench.rows import Row
from tools.bench.workloads import equal_jobs

BATCHES = (1, 16)
PROMPT_TOKENS = 32

_STEPS = 40
_HEAD, _LINEARS, _HOST = "head", "linears of the layers", "scheduler and host"
_PARTS = (_HEAD, _LINEARS, "attention", "norms", "rotation", "activations", "rest of the model", "sampler", _HOST)
_MATRIX = 2048


class Clock:
    """Seconds spent in each part, without the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def around(self, name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed; `name` tells the part from its arguments."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - begun
                self.seconds[name(*args)] += whole - self._inner.pop()
                self._inner[-1] += whole

        return timed


def decode_rows(subject: str, engine: Engine, model: FittedModel) -> list[Row]:
    """A row for each part and batch size, with floors where there are any."""
    bandwidth, rate = read_bandwidth(), product_rate()
    rows = [
        Row(subject, "reading memory", bandwidth / 1e9, "GB/s"),
        Row(subject, f"a product of {_MATRIX}³", rate / 1e9, "GFLOP/s"),
    ]
    head, layers = _weights(model)
    for batch in BATCHES:
        floors = {name: 1000 * _floor_s(of, batch, bandwidth, rate) for name, of in ((_HEAD, head), (_LINEARS, layers))}
        start_decoding(engine, model, batch)
        step_ms = _step_ms(engine)
        name = f"decode of {batch}"
        rows.append(Row(subject, f"{name}: a step", step_ms, "ms", sum(floors.values()), "the floors of its products"))
        for part, ms in parts_ms(engine, model).items():
            floor = floors.get(part)
            rows.append(Row(subject, f"{name}: {part}", ms, "ms", floor, "its floor" if floor else ""))
    engine.reset(Epoch(0))
    return rows


def read_bandwidth() -> float:
    """Bytes a second that all threads together read: the better of a sum and a product with a vector, over 1 GiB."""
    values = torch.ones(1 << 16, 1 << 12)
    vector = torch.ones(1 << 12)
    calls = (values.sum, lambda: torch.mv(values, vector))
    return values.numel() * 4 / min(_seconds(call) for call in calls)


def product_rate() -> float:
    """Operations a second of a large bfloat16 product."""
    a, b = (torch.randn(_MATRIX, _MATRIX).to(torch.bfloat16) for _ in range(2))
    return 2 * _MATRIX**3 / _seconds(lambda: a @ b)


def _seconds(call: Callable[[], object], repeats: int = 10) -> float:
    call()
    times: list[float] = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _weights(model: FittedModel) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Of the head, and of all other products."""
    weights = [module.weight for module in model.module.modules() if isinstance(module, Linear)]
    head = [weight for weight in weights if weight.shape[0] == model.vocab_size]
    return head, [weight for weight in weights if weight.shape[0] != model.vocab_size]


def _floor_s(weights: Sequence[Tensor], rows: int, bandwidth: float, rate: float) -> float:
    elements = sum(weight.numel() for weight in weights)
    return max(elements * weights[0].element_size() / bandwidth, 2 * elements * rows / rate)


def start_decoding(engine: Engine, model: FittedModel, batch: int) -> None:
    """Bring `batch` sequences past their prompts."""
    engine.reset(Epoch(0))
    sampling = Sampling(temperature=0, max_tokens=4 * _STEPS, ignore_eos=True)
    jobs = equal_jobs(batch, PROMPT_TOKENS, 4 * _STEPS, model.vocab_size - 1)
    engine.submit([submission(number, job.prompt, sampling) for number, job in enumerate(jobs)])
    answered = 0
    while answered < 4 * batch:
        done = engine.step()
        answered += len(done.tokens) // 4 if done is not None else 0


def _step_ms(engine: Engine) -> float:
    times: list[float] = []
    for _ in range(_STEPS):
        begun = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def parts_ms(engine: Engine, model: FittedModel, count: int = _STEPS) -> dict[str, float]:
    """Medians over `count` steps of an engine that is decoding."""
    steps: list[dict[str, float]] = []
    with _timed(model) as clock:
        step = clock.around(lambda *_: _HOST, engine.step)
        for _ in range(count):
            clock.seconds.clear()
            step()
            steps.append(dict(clock.seconds))
    return {part: 1000 * statistics.median(taken.get(part, 0.0) for taken in steps) for part in _PARTS}


@contextmanager
def _timed(model: FittedModel) -> Iterator[Clock]:
    """A clock around every part of a step, for the time of the block."""

    def product(_: object, x: Tensor, weight_OI: Tensor, *rest: object) -> str:
        return _HEAD if weight_OI.shape[0] == model.vocab_size else _LINEARS

    clock = Clock()
    places: list[tuple[Any, str, Callable[..., str]]] = [
        (PackedMatmul, "__call__", product),
        (CpuAttentionStep, "attend", lambda *_: "attention"),
        (CpuNorm, "forward", lambda *_: "norms"),
        (CpuAttentionStep, "turn", lambda *_: "rotation"),
        (cpu_layers, "turned", lambda *_: "rotation"),
        (CpuMLP, "forward", lambda *_: "activations"),
        (ModelRunner, "launch", lambda *_: "rest of the model"),
        (Sampler, "sample", lambda *_: "sampler"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            original = getattr(owner, name)
            setattr(owner, name, clock.around(part, original))
            stack.callback(setattr, owner, name, original)
        yield clock
