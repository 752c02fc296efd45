"""One forward pass on the meta device: what each attention layer hands over, and that the model can be run at all.

Nothing is computed. The pass finds the shapes that the KV cache needs from what the layers really do, and refuses a
model that branches on values or never reaches the registered attention function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dataplane.models.structure import attention_modules, refused

DRY_ATTENTION = "perdure_dry_run"


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer of this stage, with this rank's heads."""

    # Slot in the engine's cache: 0, 1, … within the stage.
    index: int
    # Layer number within the whole model.
    layer_idx: int
    kv_heads: int
    q_heads: int
    key_dim: int
    value_dim: int
    # Tokens a query sees, itself included; None: all.
    window: int | None


Calls = list[tuple[nn.Module, AttentionLayer]]


def dry_run(model: nn.Module, forward: Callable[[], object], moved: Callable[[], None]) -> tuple[AttentionLayer, ...]:
    """Run `forward` with DRY_ATTENTION recording, and mark each attention module with its cache slot.

    `moved` is called at each layer. Raises Rejected where a layer is not reached, is reached twice, or the model cannot
    run without values.
    """
    calls: Calls = []
    ALL_ATTENTION_FUNCTIONS.register(DRY_ATTENTION, _recorder(calls, moved))
    try:
        forward()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError, KeyError) as error:
        raise refused(model, f"its forward pass fails when nothing is computed: {error}") from error
    reached = {id(module) for module, _ in calls}
    if len(reached) != len(calls):
        raise refused(model, "an attention layer calls its attention function more than once")
    for name, module in attention_modules(model):
        if id(module) not in reached:
            raise refused(model, f"{name} does not call the registered attention function")
    for module, layer in calls:
        module.perdure_layer = layer.index  # type: ignore[assignment]
    return tuple(layer for _, layer in calls)


def _recorder(calls: Calls, moved: Callable[[], None]) -> Callable[..., tuple[Tensor, None]]:
    def record(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, sliding_window: int | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """An attention function: q (1, H, T, D), k and v (1, K, T, D)."""
        if mask is not None:
            raise ValueError("an attention mask is built for a registered attention function")
        window = sliding_window or None
        layer = AttentionLayer(
            len(calls), int(module.layer_idx), k.shape[1], q.shape[1], k.shape[3], v.shape[3], window
        )
        calls.append((module, layer))
        moved()
        return torch.empty(1, q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device), None

    return record
