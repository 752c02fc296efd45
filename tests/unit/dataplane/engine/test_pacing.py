"""How many tokens the pacer allows, by what it has seen."""

from __future__ import annotations

import pytest

from dataplane.engine.pacing import Pacer


def test_all_before_anything_is_known() -> None:
    assert Pacer(0.25, 8192).tokens(decoding=True) == 8192


def test_a_long_prompt_is_cut_to_the_time_of_a_step() -> None:
    pacer = Pacer(0.25, 8192)
    pacer.observe(1000, 1.0)
    assert pacer.tokens(decoding=True) == 250


def test_where_no_stream_waits_a_step_may_take_twice_as_long() -> None:
    pacer = Pacer(0.25, 8192)
    pacer.observe(1000, 1.0)
    assert pacer.tokens(decoding=False) == 500


def test_what_any_step_takes_is_not_counted_as_its_tokens() -> None:
    pacer = Pacer(0.25, 8192)
    pacer.observe(8, 0.05)
    pacer.observe(100, 0.15)
    assert pacer.tokens(decoding=True) == 200


def test_prompts_may_double_a_step_that_is_long_without_them() -> None:
    pacer = Pacer(0.25, 8192)
    pacer.observe(8, 0.5)
    pacer.observe(100, 0.8)
    assert pacer.tokens(decoding=True) == 166


@pytest.mark.parametrize("seconds", [0.01, 10.0])
def test_a_step_always_has_room_for_a_few_and_never_for_more_than_the_budget(seconds: float) -> None:
    pacer = Pacer(0.25, 512)
    pacer.observe(64, seconds)
    assert pacer.tokens(decoding=True) == (512 if seconds < 1 else 32)


def test_a_long_step_no_slower_than_a_short_one_still_costs_something() -> None:
    pacer = Pacer(0.25, 1 << 20)
    pacer.observe(8, 0.2)
    pacer.observe(100, 0.1)
    assert pacer.tokens(decoding=True) < 1 << 20
