"""A layer's experts on their own, and choices for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dataplane.models.structure import expert_modules
from dataplane.parallel.expert import ExpertShard, grouped_matmul
from dataplane.parallel.groups import Group
from tests.support.models import family_config, random_model


def experts_of(family: str) -> Any:
    """One layer's experts, with transformers' own forward code."""
    config = family_config(family)
    config._experts_implementation = "eager"
    module: Any = next(module for _, module in expert_modules(random_model(config)))
    module.perdure_experts = ExpertShard(0, module.num_experts, Group("tensor", (0,), 0))
    module.matmul = F.linear
    module.grouped_matmul = grouped_matmul
    return module


def choices(module: Any, tokens: int = 17) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_TH = torch.randn(tokens, 64, generator=generator)
    scores = torch.rand(tokens, module.num_experts, generator=generator)
    weights_TK, chosen_TK = scores.topk(2)
    return x_TH, chosen_TK, weights_TK
