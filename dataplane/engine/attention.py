"""The attention function that every model's layers call, and the step that it works for.

transformers' attention modules call a registered function by name. Ours takes keys and values into the paged cache and
attends to it; the batch under way is found here, not in the call, since some layers drop extra arguments.

Shape letters: T tokens of the step, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "perdure"


@dataclass(frozen=True, slots=True)
class Score:
    """How a layer turns products of queries and keys into weights."""

    scaling: float
    # Tokens a query sees, itself included; None: all before it.
    window: int | None = None
    softcap: float | None = None
    # (H,): a logit a head that takes weight and gives nothing.
    sinks_H: Tensor | None = None


class AttentionStep(Protocol):
    """One step's attention on one kind of device."""

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, score: Score) -> Tensor:
        """Store the step's keys and values in cache slot `layer`; return (T, H, D_value)."""
        ...


_running: AttentionStep | None = None


def running_step() -> AttentionStep:
    """The step that layers attend for now."""
    assert _running is not None, "attention outside a step"
    return _running


@contextmanager
def running(step: AttentionStep) -> Iterator[None]:
    """Make `step` the one that layers attend for."""
    global _running
    assert _running is None, "a step is under way"
    _running = step
    try:
        yield
    finally:
        _running = None


def attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """q (1, H, T, D), k and v (1, K, T, D), normed and rotated → (1, T, H, D_value)."""
    assert _running is not None, "attention outside a step"
    assert mask is None, "no mask is ever built for this function"
    score = Score(scaling, sliding_window or None, softcap, s_aux)
    out_THD = _running.attend(
        module.perdure_layer, q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), score
    )
    return out_THD.unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
