from __future__ import annotations

import pytest
import torch

from dataplane.parallel.expert import _by_expert, _by_groups, experts_forward
from tests.support.experts import choices, experts_of
from tests.support.models import MOE_FAMILIES
from tests.support.ranks import RankPool

JOBS = "tests.unit.dataplane.parallel.expert_jobs"


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_one_function_equals_every_familys_own_code(family: str) -> None:
    module = experts_of(family)
    x_TH, chosen_TK, weights_TK = choices(module)
    with torch.no_grad():
        torch.testing.assert_close(
            experts_forward(module, x_TH, chosen_TK, weights_TK), module(x_TH, chosen_TK, weights_TK)
        )


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_grouped_products_equal_one_product_an_expert(family: str) -> None:
    module = experts_of(family)
    rows = torch.randn(9, 64)
    # Expert 1 gets nothing; the last two rows belong to experts elsewhere.
    sorted_S = torch.tensor([0, 0, 0, 2, 2, 3, 3, module.num_experts, module.num_experts])
    with torch.no_grad():
        one, grouped = (compute(module, rows, sorted_S, module.num_experts) for compute in (_by_expert, _by_groups))
    torch.testing.assert_close(one[:7], grouped[:7])


def test_grouped_products_never_wait_for_the_host() -> None:
    """On meta any read of a value raises."""
    module = experts_of("mixtral").to("meta", torch.bfloat16)
    rows = torch.empty(9, 64, dtype=torch.bfloat16, device="meta")
    sorted_S = torch.empty(9, dtype=torch.long, device="meta")
    assert _by_groups(module, rows, sorted_S, 4).shape == (9, 64)


def test_a_neighbour_in_the_batch_changes_no_bit() -> None:
    module = experts_of("qwen3_moe")
    x_TH, chosen_TK, weights_TK = choices(module, tokens=64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        one = experts_forward(module, x_TH, chosen_TK, weights_TK)
        other = experts_forward(module, x_TH[order], chosen_TK[order], weights_TK[order])
    torch.testing.assert_close(one[order], other, rtol=0, atol=1e-6)


def test_tokens_of_different_ranks_meet_their_experts_by_all_to_all(rank_pool: RankPool) -> None:
    results = rank_pool.run(f"{JOBS}:spread_experts", 3)
    assert all(difference < 1e-5 for difference in results)
