"""What the ranks of the expert tests do; apart from the other jobs, since it takes transformers to run."""

from __future__ import annotations

import torch

from dataplane.parallel.expert import ExpertShard, experts_forward, spread_forward
from dataplane.parallel.split import cut
from tests.support.experts import choices, experts_of
from tests.support.ranks import Ranks


def spread_experts(ranks: Ranks) -> float:
    """Tokens of this rank alone, through experts that lie on all: the difference to having all experts here."""
    module = experts_of("mixtral")
    tokens = 5 + 4 * ranks.rank
    x_TH, chosen_TK, weights_TK = choices(module, tokens)
    with torch.no_grad():
        wanted = experts_forward(module, x_TH, chosen_TK, weights_TK)
        group = ranks.mesh(data=ranks.size).data
        first, last = cut(module.num_experts, group.size, group.index)
        module.perdure_experts = ExpertShard(first, last - first, group)
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(parameter[first:last], requires_grad=False))
        got = spread_forward(module, x_TH, chosen_TK, weights_TK, group)
    return float((got - wanted).abs().max())
