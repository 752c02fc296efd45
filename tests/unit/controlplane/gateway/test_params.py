"""From fields to sampling parameters; what HTTP tests do not reach more cheaply."""

from __future__ import annotations

import pytest

from controlplane.gateway.api_errors import CONTEXT_CODE, ApiError
from controlplane.gateway.limits import GatewayLimits
from controlplane.gateway.openai import ChatRequest, CompletionRequest
from controlplane.gateway.params import (
    answer_tokens,
    check_ids,
    choice_seeds,
    mixed_seed,
    wanted_chat,
    wanted_completion,
)

LIMITS = GatewayLimits()
VOCAB = 100


def chat(**fields: object):
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})
    return wanted_chat(request, LIMITS, VOCAB)


def completion(**fields: object):
    return wanted_completion(CompletionRequest.model_validate({"prompt": "x", **fields}), LIMITS, VOCAB)


def test_a_null_takes_the_default():
    sampling = completion(
        temperature=None, top_p=None, n=None, stop=None, logit_bias=None, seed=None, guided_json=None
    ).sampling
    assert (sampling.temperature, sampling.top_p, sampling.logprobs) == (1.0, 1.0, None)


def test_minus_one_turns_top_k_off():
    assert completion(top_k=-1).sampling.top_k == 0


def test_empty_stop_strings_are_none():
    assert completion(stop=["", "a"]).texts.stops == ("a",)
    assert completion(stop="").texts.stops == ()


def test_a_completion_has_sixteen_tokens_unless_told_and_a_chat_the_whole_context():
    assert answer_tokens(completion(), 10, 512, "prompt") == 16
    assert answer_tokens(completion(max_tokens=None), 10, 512, "prompt") == 502
    assert answer_tokens(chat(), 10, 512, "messages") == 502


def test_max_completion_tokens_comes_before_max_tokens():
    wanted = chat(max_tokens=5, max_completion_tokens=7)
    assert (wanted.max_tokens, wanted.max_tokens_param) == (7, "max_completion_tokens")


@pytest.mark.parametrize(("prompt", "asked"), [(512, 1), (511, 2), (600, None)])
def test_what_does_not_fit_the_context_is_refused_not_cut(prompt: int, asked: int | None):
    with pytest.raises(ApiError) as refusal:
        answer_tokens(chat(max_tokens=asked), prompt, 512, "messages")
    assert refusal.value.code == CONTEXT_CODE


def test_an_answer_may_fill_the_context_exactly():
    assert answer_tokens(chat(max_tokens=12), 500, 512, "messages") == 12


def test_logprobs_of_a_prompt_are_computed_for_an_echo_only():
    assert completion(logprobs=3).sampling.prompt_logprobs is None
    assert completion(logprobs=3, echo=True).sampling.prompt_logprobs == 3


def test_an_echo_of_nothing_more_asks_for_one_token_that_is_not_shown():
    wanted = completion(max_tokens=0, echo=True)
    assert (wanted.max_tokens, wanted.texts.prompt_only) == (1, True)


def test_chat_logprobs_without_alternatives():
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat().sampling.logprobs is None


def test_seeds_are_fixed_by_the_clients_and_apart_for_each_choice():
    assert choice_seeds(7, 3) == choice_seeds(7, 3)
    assert choice_seeds(7, 3)[0] == 7
    assert len(set(choice_seeds(7, 100))) == 100
    assert choice_seeds(-1, 1) == (2**64 - 1,)
    assert choice_seeds(None, 1) != choice_seeds(None, 1)


def test_mixed_seeds_are_those_of_splitmix64():
    # First outputs of the published generator from state 0, which is what a replay elsewhere must find.
    assert [mixed_seed(0, step) for step in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.parametrize("ids", [[], [0], [VOCAB - 1, 0, 5]])
def test_ids_of_the_vocabulary_pass(ids: list[int]):
    check_ids("prompt", ids, VOCAB)


@pytest.mark.parametrize(
    ("ids", "index", "token"), [([3, -1, -2], 1, -1), ([VOCAB], 0, VOCAB), ([1, 2, 2**40], 2, 2**40)]
)
def test_the_first_id_that_is_no_tokens_is_named(ids: list[int], index: int, token: int):
    with pytest.raises(ApiError) as refused:
        check_ids("prompt[4]", ids, VOCAB)
    assert refused.value.param == "prompt"
    text = f"token id {token} is not in the vocabulary, whose ids are 0 to {VOCAB - 1}"
    assert refused.value.message == f"prompt[4][{index}]: {text}"
