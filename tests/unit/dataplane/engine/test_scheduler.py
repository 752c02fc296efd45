from __future__ import annotations

from itertools import pairwise

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.runtime.messages.common import SOLO_TOKENS, ReasonKind, Sampling
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.packing import unpack_u32
from dataplane.engine.plan import StepPlan
from dataplane.engine.scheduler import PRIORITY_TOKENS
from dataplane.frames import SequenceId
from tests.unit.dataplane.engine.simulation import VOCABULARY, Machine, continuation, limits, request

# ---------------------------------------------------------------- properties

TURNS_MAX, CROWD = 2000, 20

tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)
# Few distinct tokens and prompts, so that prefixes are shared.
prompts = st.one_of(tokens, st.integers(1, 30).map(lambda n: [7] * n), st.integers(1, 30).map(lambda n: list(range(n))))
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(0, 12),
    min_tokens=st.integers(0, 4),
    stop_ids=st.sampled_from([(), (3,), tuple(range(0, VOCABULARY, 9))]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
)
choices = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "sampling": samplings,
        "priority": st.integers(-1, 1),
        "allow_cached": st.booleans(),
        "solo": st.sampled_from([False, False, False, True]),
        "group": st.integers(0, 2),
        "cache_salt": st.sampled_from(["", "tenant"]),
    }
)
machines = st.fixed_dictionaries(
    {
        "total_blocks": st.integers(10, 20),
        "max_sequences": st.integers(1, 5),
        "max_batch_tokens": st.integers(5, 30),
        "lookahead": st.booleans(),
        "enable_prefix_cache": st.booleans(),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    machine=machines,
    depth=st.integers(1, 3),
    events=st.lists(st.one_of(choices, st.integers(0, 40)), min_size=1, max_size=30),
    cancelled=st.sets(st.integers(0, 29), max_size=4),
    budget=st.integers(1, 30),
)
def test_any_load_ends_with_each_sequence_whole(
    machine: dict, depth: int, events: list, cancelled: set[int], budget: int
) -> None:
    """Whatever is submitted, preempted, shared, cancelled or in flight: no block leaks or is freed twice
    (`check` after every step), no budget is passed, nobody starves, and each sequence gets the tokens it has alone."""
    simulated = Machine(limits(**machine), depth)
    submitted = []
    for event in events:
        if isinstance(event, dict):
            item = request(len(submitted), **event)
            submitted.append(item)
            simulated.submit(item)
            continue
        for _ in range(event // 8):
            simulated.turn(budget)
        if event in cancelled:
            simulated.scheduler.cancel([SequenceId(event)])
    simulated.drain()
    assert simulated.scheduler.load().free_blocks == machine["total_blocks"]
    for item in submitted:
        tokens_max = min(len(item.prompt) + item.sampling.max_tokens, 40)
        expected = continuation(item, tokens_max)
        ended = simulated.ends[item.id]
        if ended.reason is FinishReason.CANCELLED:
            assert simulated.tokens[item.id] == expected[: len(simulated.tokens[item.id])]
            continue
        assert simulated.tokens[item.id] == expected
        stopped = bool(expected) and expected[-1] in item.sampling.stop_ids
        assert ended.reason is (FinishReason.STOP if stopped and ended.stop_id is not None else FinishReason.LENGTH)


@settings(max_examples=30, deadline=None)
@given(
    machine=machines,
    depth=st.integers(1, 3),
    victim=choices,
    others=st.lists(choices, min_size=1, max_size=6),
    budget=st.integers(1, 30),
)
def test_nobody_starves_however_many_keep_coming(
    machine: dict, depth: int, victim: dict, others: list[dict], budget: int
) -> None:
    """With a crowd of the same priority waiting at all times, each sequence still ends in bounded time."""
    simulated = Machine(limits(**machine), depth)
    simulated.submit(request(0, **victim))
    for turn in range(TURNS_MAX):
        if SequenceId(0) in simulated.ends:
            return
        if simulated.scheduler.load().waiting < CROWD:
            newcomer = {**others[turn % len(others)], "priority": victim["priority"]}
            simulated.submit(request(turn + 1, **newcomer))
        simulated.turn(budget)
    raise AssertionError("starvation")


@settings(max_examples=100, deadline=None)
@given(prompt=tokens, sampling=samplings, cut=st.integers(0, 12))
def test_replay_after_any_token_gives_the_rest(prompt: list[int], sampling: Sampling, cut: int) -> None:
    whole = Machine(limits())
    first = request(1, prompt, sampling)
    whole.submit(first)
    whole.drain()
    delivered = whole.tokens[first.id][:cut]
    replay = Machine(limits())
    replay.submit(request(2, prompt, sampling, delivered))
    replay.drain()
    assert delivered + replay.tokens[SequenceId(2)] == whole.tokens[first.id]
    assert replay.ends[SequenceId(2)].reason is whole.ends[first.id].reason
    assert replay.ends[SequenceId(2)].stop_id == whole.ends[first.id].stop_id


# ---------------------------------------------------------------- steps


def test_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    machine = Machine(limits())
    machine.submit(request(1, range(30), Sampling(max_tokens=1)))
    machine.drain()
    assert [list(unpack_u32(plan.counts)) for plan in machine.plans] == [[16], [14]]
    assert [list(unpack_u32(plan.samples)) for plan in machine.plans] == [[0], [1]]


def test_running_sequences_decode_beside_a_long_prompt() -> None:
    machine = Machine(limits())
    machine.submit(request(1, range(4), Sampling(max_tokens=20)))
    machine.turn()
    machine.submit(request(2, range(10, 40), Sampling(max_tokens=1)))
    machine.turn()
    machine.turn()
    assert [dict(zip(machine.members(plan), unpack_u32(plan.counts), strict=True)) for plan in machine.plans[1:]] == [
        {1: 1, 2: 15},
        {1: 1, 2: 15},
    ]


def test_decodes_go_on_when_the_step_is_paced_to_nothing() -> None:
    machine = Machine(limits())
    machine.submit(*(request(n, [n, n], Sampling(max_tokens=5)) for n in range(4)))
    machine.turn()
    machine.turn(tokens_max=1)
    assert machine.members(machine.plans[-1]) == [0, 1, 2, 3]


def test_short_prompt_overtakes_a_long_one_that_came_before() -> None:
    machine = Machine(limits(max_model_tokens=60, total_blocks=32))
    machine.submit(request(1, [1] * 50, Sampling(max_tokens=1)))
    machine.turn()
    machine.submit(request(2, [2] * 4, Sampling(max_tokens=1)))
    machine.turn()
    assert SequenceId(2) in machine.ends
    assert SequenceId(1) not in machine.ends


def test_long_prompt_is_not_overtaken_for_ever() -> None:
    machine = Machine(limits(max_sequences=1))
    machine.submit(request(0, [9] * 4, Sampling(max_tokens=1)), request(1, [1] * 30, Sampling(max_tokens=1)))
    for number in range(2, 40):
        machine.submit(request(number, [number] * 4, Sampling(max_tokens=1)))
        machine.turn()
        if SequenceId(1) in machine.ends:
            break
    # Its prompt is worth eight of theirs.
    assert number < 14


def test_higher_priority_goes_first_and_takes_the_place_of_a_lower() -> None:
    machine = Machine(limits(max_sequences=1))
    machine.submit(request(1, [1] * 4, Sampling(max_tokens=9)))
    machine.turn()
    machine.submit(request(2, [2] * 4, Sampling(max_tokens=1)), request(3, [3] * 4, Sampling(max_tokens=1), priority=1))
    machine.turn()
    assert list(machine.ends) == [3]
    machine.drain()
    assert list(machine.ends) == [3, 1, 2]
    assert len(machine.tokens[SequenceId(1)]) == 9


def test_waiting_long_enough_is_worth_a_priority_level() -> None:
    machine = Machine(limits(max_sequences=1))
    machine.submit(request(0, [0], Sampling(max_tokens=2)), request(1, [1], Sampling(max_tokens=1), priority=-1))
    machine.turn()
    machine.scheduler._clock += PRIORITY_TOKENS
    machine.submit(request(2, [2] * 4, Sampling(max_tokens=1)))
    machine.drain()
    assert list(machine.ends) == [0, 1, 2]


def test_solo_sequence_has_every_step_to_itself() -> None:
    machine = Machine(limits(), depth=2)
    machine.submit(
        request(1, [1] * 4, Sampling(max_tokens=SOLO_TOKENS + 2)),
        request(2, [2] * 20, Sampling(max_tokens=SOLO_TOKENS), solo=True),
        request(3, [3] * 4, Sampling(max_tokens=SOLO_TOKENS + 2)),
    )
    machine.drain()
    steps = [machine.members(plan) for plan in machine.plans]
    assert all(step == [2] for step in steps if 2 in step)
    # It takes turns with the others: neither waits for the other's end.
    shared = [index for index, step in enumerate(steps) if step != [2]]
    assert steps.index([2]) < shared[-1]
    assert shared[0] < len(steps) - 1 - steps[::-1].index([2])


def test_solo_sequence_is_acquitted_and_joins_the_others() -> None:
    machine = Machine(limits(), depth=1)
    machine.submit(
        request(1, [1] * 4, Sampling(max_tokens=40)),
        request(2, [2] * 4, Sampling(max_tokens=20), delivered=[7, 7], solo=True),
    )
    machine.drain()
    steps = [machine.members(plan) for plan in machine.plans]
    assert sum(step == [2] for step in steps) == SOLO_TOKENS
    assert any(sorted(step) == [1, 2] for step in steps)


def test_solo_sequence_is_not_held_up_by_steps_in_flight() -> None:
    """Its turn comes only when none is in flight, which others must not prevent by launching on."""
    machine = Machine(limits(), depth=3)
    machine.submit(request(1, [1] * 4, Sampling(max_tokens=30)), request(2, [2] * 4, Sampling(max_tokens=30)))
    machine.turn()
    machine.submit(request(3, [3] * 4, Sampling(max_tokens=2), solo=True))
    for _ in range(12):
        machine.turn()
    assert SequenceId(3) in machine.ends


def test_lookahead_feeds_a_token_back_before_it_is_known() -> None:
    machine = Machine(limits(lookahead=True), depth=2)
    machine.submit(request(1, [5, 6], Sampling(max_tokens=4)))
    machine.turn()
    machine.turn()
    assert machine.tokens[SequenceId(1)] == [] or len(machine.tokens[SequenceId(1)]) == 1
    feedback = unpack_u32(machine.plans[1].feedback)
    assert list(feedback) == [0]
    machine.drain()
    assert machine.tokens[SequenceId(1)] == continuation(request(1, [5, 6]), 6)


def test_penalised_sequence_waits_for_its_token() -> None:
    machine = Machine(limits(lookahead=True), depth=2)
    machine.submit(request(1, [5, 6], Sampling(max_tokens=4, presence_penalty=0.5)))
    machine.drain()
    assert all(list(unpack_u32(plan.feedback)) == [0xFFFFFFFF] for plan in machine.plans)


def test_plan_survives_its_wire_form() -> None:
    machine = Machine(limits())
    machine.submit(request(1, range(7)))
    machine.turn()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(machine.plans[0]), type=StepPlan) == machine.plans[0]


# ---------------------------------------------------------------- blocks


def test_preempted_sequence_computes_again_and_ends_with_the_same_tokens() -> None:
    machine = Machine(limits(total_blocks=10, enable_prefix_cache=False))
    machine.submit(*(request(n, [n] * 12, Sampling(max_tokens=20)) for n in range(3)))
    machine.drain()
    firsts = [list(unpack_u32(plan.starts)).count(0) for plan in machine.plans]
    assert sum(firsts) > 3, "nothing was preempted"
    for n in range(3):
        assert machine.tokens[SequenceId(n)] == continuation(request(n, [n] * 12), 32)


def test_oldest_sequence_is_never_preempted() -> None:
    machine = Machine(limits(total_blocks=10, enable_prefix_cache=False))
    machine.submit(*(request(n, [n] * 12, Sampling(max_tokens=20)) for n in range(3)))
    machine.drain()
    starts = [dict(zip(machine.members(plan), unpack_u32(plan.starts), strict=True)).get(0) for plan in machine.plans]
    positions = [start for start in starts if start is not None]
    assert all(a < b for a, b in pairwise(positions))


def test_prefix_is_shared_with_a_later_sequence() -> None:
    machine = Machine(limits())
    machine.submit(request(1, [*range(12), 40], Sampling(max_tokens=2)))
    machine.drain()
    machine.scheduler.take_admitted()
    machine.submit(request(2, [*range(12), 41], Sampling(max_tokens=2)))
    machine.drain()
    assert machine.scheduler.take_admitted() == ((SequenceId(2), 12),)


def test_prefix_is_not_shared_across_salts_or_without_leave() -> None:
    machine = Machine(limits())
    machine.submit(request(1, range(13), Sampling(max_tokens=1), cache_salt="a"))
    machine.drain()
    machine.submit(
        request(2, range(13), Sampling(max_tokens=1), cache_salt="b"),
        request(3, range(13), Sampling(max_tokens=1), cache_salt="a", allow_cached=False),
        request(4, range(13), Sampling(max_tokens=1), cache_salt="a"),
    )
    machine.drain()
    assert dict(machine.scheduler.take_admitted()) == {1: 0, 2: 0, 3: 0, 4: 12}


def test_group_computes_its_prompt_once() -> None:
    for cached in (True, False):
        machine = Machine(limits(max_batch_tokens=32))
        machine.submit(*(request(n, range(14), Sampling(max_tokens=3), group=5, allow_cached=cached) for n in range(3)))
        machine.drain()
        assert dict(machine.scheduler.take_admitted()) == {0: 0, 1: 12, 2: 12}


def test_failed_step_publishes_nothing() -> None:
    machine = Machine(limits())
    machine.scheduler.submit(request(1, range(13)))
    assert machine.scheduler.plan(100) is not None
    assert machine.scheduler.newest_prefixes(8) == []


def test_poisoned_sequence_ends_alone_and_its_blocks_are_scrubbed() -> None:
    machine = Machine(limits())
    machine.scheduler.submit(request(1, range(11)))
    machine.scheduler.submit(request(2, range(20, 24), priority=-1))
    plan = machine.scheduler.plan(100)
    assert plan is not None
    completed = machine.scheduler.complete(plan.number, [VOCABULARY, 7], poisoned={0})
    assert [(ended.sequence, ended.reason) for ended in completed.ended] == [(1, FinishReason.ERROR)]
    assert completed.ended[0].error is not None
    assert completed.ended[0].error.kind is ReasonKind.POISON
    assert [emitted.token for emitted in completed.emitted] == [7]
    assert len(machine.scheduler.newest_prefixes(8)) == 1, "only the healthy sequence's block is published"
    machine.scheduler.check()
    following = machine.scheduler.plan(100)
    assert following is not None
    assert len(unpack_u32(following.scrub)) == 3


# ---------------------------------------------------------------- ends


def test_too_long_request_is_refused_with_its_numbers() -> None:
    machine = Machine(limits())
    machine.submit(request(1, [1] * 40), request(2, []), request(3, [VOCABULARY]))
    machine.drain()
    errors = {number: machine.ends[SequenceId(number)].error for number in (1, 2, 3)}
    assert all(error is not None and error.kind is ReasonKind.INVALID for error in errors.values())
    assert "40 tokens" in errors[1].text  # type: ignore[union-attr]
    assert "empty" in errors[2].text  # type: ignore[union-attr]
    assert "vocabulary" in errors[3].text  # type: ignore[union-attr]


def test_answer_ends_at_the_models_limit() -> None:
    machine = Machine(limits())
    machine.submit(request(1, [1] * 35, Sampling(max_tokens=100)))
    machine.drain()
    assert len(machine.tokens[SequenceId(1)]) == 5
    assert machine.ends[SequenceId(1)].reason is FinishReason.LENGTH


def test_stop_token_is_delivered_and_ends_the_answer_after_min_tokens() -> None:
    answer = continuation(request(1, [1, 2, 3]), 30)
    stop = answer[6]
    eos = limits(eos_ids=frozenset({stop}))
    machine = Machine(eos)
    first = answer.index(stop)
    machine.submit(
        request(1, [1, 2, 3], Sampling(max_tokens=20)),
        request(2, [1, 2, 3], Sampling(max_tokens=20, ignore_eos=True)),
        request(3, [1, 2, 3], Sampling(max_tokens=20, min_tokens=first + 1)),
    )
    machine.drain()
    assert machine.tokens[SequenceId(1)] == answer[: first + 1]
    assert machine.ends[SequenceId(1)].stop_id == stop
    assert machine.tokens[SequenceId(2)] == answer[:20]
    assert len(machine.tokens[SequenceId(3)]) > first + 1


def test_cancelled_sequences_free_their_blocks_at_once() -> None:
    machine = Machine(limits())
    machine.submit(request(1, [1] * 20), request(2, [2] * 20))
    machine.turn()
    machine.scheduler.cancel([SequenceId(1), SequenceId(2), SequenceId(77)])
    assert machine.scheduler.load().free_blocks == 16
    machine.drain()
    assert {ended.reason for ended in machine.ends.values()} == {FinishReason.CANCELLED}
