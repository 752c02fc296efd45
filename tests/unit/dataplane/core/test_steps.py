"""From an engine's step to the gateways: tokens, finishes, log probabilities, and ranks that break the protocol."""

from __future__ import annotations

import pytest

from controlplane.runtime.ids import Epoch, RequestId
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.serve import Admitted, CancelSlots, FinishReason, SlotsLost, StepTokens
from controlplane.runtime.packing import pack_f32, pack_u32, unpack_u32
from dataplane import frames
from dataplane.core import cursors
from dataplane.core.messages import KillRank, SendLeader, SendRank
from tests.scenario.worker.model import Worker, sent, serving


def steps(worker: Worker, gateway: str = "g") -> list[StepTokens]:
    """What the stream gives until it is empty."""
    return [body for body in sent(worker.flush(gateway), worker, gateway) if isinstance(body, StepTokens)]


def logprob(worker: Worker, index: int, *, prompt: bool = False) -> frames.Logprobs:
    return frames.Logprobs(
        sequence=worker.sequences["a", 0],
        index=index,
        chosen=-0.5,
        chosen_rank=1,
        top_ids=pack_u32([4, 5]),
        top_values=pack_f32([-0.5, -1.5]),
        prompt=prompt,
    )


def done(worker: Worker, count: int, logprobs: tuple[frames.Logprobs, ...]) -> frames.StepDone:
    return frames.StepDone(
        epoch=Epoch(1),
        step=1,
        sequences=pack_u32([worker.sequences["a", 0]]),
        first_index=pack_u32([0]),
        counts=pack_u32([count]),
        tokens=pack_u32(range(count)),
        logprobs=logprobs,
        finished=(),
    )


def test_log_probabilities_travel_with_their_tokens() -> None:
    worker = serving()
    worker.open("g", "a")
    worker.flush("g")
    effects = worker.says(
        "cpu:0", done(worker, 2, (logprob(worker, 0), logprob(worker, 1), logprob(worker, 2, prompt=True)))
    )
    (step,) = (body for body in sent(effects, worker, "g") if isinstance(body, StepTokens))
    assert [(entry.prompt, entry.index) for entry in step.logprobs] == [(True, 2), (False, 0), (False, 1)]
    assert {entry.slot for entry in step.logprobs} == set(worker.slots_of("a"))


def test_a_message_is_bounded_and_the_rest_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursors, "MESSAGE_TOKENS_MAX", 10)
    worker = serving()
    worker.open("g", "a", choices=2)
    worker.step_ends("cpu:0", 1, {("a", 0): (0, range(17)), ("a", 1): (0, range(6))}, [("a", 0)])
    parts = steps(worker)
    assert [len(unpack_u32(part.tokens)) for part in parts] == [10, 10, 3]
    assert [len(part.finish) for part in parts] == [0, 1, 0], "the finish comes with the last token"


def test_the_number_of_log_probabilities_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursors, "MESSAGE_LOGPROBS_MAX", 4)
    worker = serving()
    worker.open("g", "a")
    worker.says("cpu:0", done(worker, 6, tuple(logprob(worker, index) for index in range(6))))
    parts = steps(worker)
    assert [[entry.index for entry in part.logprobs] for part in parts] == [[0, 1, 2, 3], [4, 5]]
    assert [list(unpack_u32(part.first_index)) for part in parts] == [[0], [4]]


def test_a_replay_with_nothing_left_to_do_is_finished_at_once() -> None:
    worker = serving()
    effects = worker.open("g", "a", delivered=(1, 2, 3), max_tokens=3)
    assert not any(isinstance(effect, SendRank) for effect in effects)
    (step,) = steps(worker)
    assert [finish.reason for finish in step.finish] == [FinishReason.LENGTH]


def test_cached_prompt_tokens_are_told_once_known() -> None:
    worker = serving()
    worker.open("g", "a")
    worker.flush("g")
    report = frames.LoadReport(
        epoch=Epoch(1),
        free_blocks=1,
        running=1,
        waiting=0,
        waiting_tokens=0,
        step_ms=1.0,
        queue=(),
        prefix_digest=b"",
        admitted=(frames.AdmittedSequence(worker.sequences["a", 0], 2),),
    )
    (admitted,) = sent(worker.says("cpu:0", report), worker, "g")
    assert isinstance(admitted, Admitted)
    assert admitted.cached_tokens == 2


def test_tokens_of_a_cancelled_sequence_are_passed_over() -> None:
    worker = serving()
    worker.open("g", "a")
    worker.open("g", "b")
    worker.flush("g")
    worker.gateway_says("g", cancel(worker, "a"))
    worker.step_ends("cpu:0", 1, {("a", 0): (0, range(3)), ("b", 0): (0, range(2))})
    assert list(worker.state.requests[RequestId("b")].choices[0].tokens) == [0, 1]
    assert not worker.state.requests[RequestId("a")].choices[0].tokens


@pytest.mark.parametrize("fault", ["gap", "columns", "answer"])
def test_a_rank_that_breaks_the_protocol_is_killed(fault: str) -> None:
    worker = serving()
    worker.open("g", "a")
    if fault == "gap":
        effects = worker.step_ends("cpu:0", 1, {("a", 0): (2, range(2))})
    elif fault == "columns":
        frame = done(worker, 2, ())
        effects = worker.says("cpu:0", frames.StepDone(frame.epoch, 1, frame.sequences, b"", b"", b"", (), ()))
    else:
        effects = worker.says("cpu:0", frames.Formed(Epoch(1)))
    assert [effect.device for effect in effects if isinstance(effect, KillRank)] == ["cpu:0"]


@pytest.mark.parametrize(
    ("kind", "blamed"),
    [(ReasonKind.DEVICE_SICK, True), (ReasonKind.ENGINE_FAULT, True), (ReasonKind.GROUP_FAILED, False)],
)
def test_a_step_that_failed_for_a_lost_peer_blames_no_request(kind: ReasonKind, blamed: bool) -> None:
    worker = serving()
    worker.open("g", "a")
    worker.flush("g")
    worker.step_begins("cpu:0", 1, [("a", 0)])
    effects = worker.says("cpu:0", frames.Failed(Epoch(1), "step", Reason(kind=kind)))
    (lost,) = (body for body in sent(effects, worker, "g") if isinstance(body, SlotsLost))
    assert lost.suspect is blamed
    told = [effect.body for effect in effects if isinstance(effect, SendLeader)]
    assert [bool(getattr(body, "suspects", ())) for body in told] == [blamed]


def cancel(worker: Worker, request: str) -> CancelSlots:
    return CancelSlots(slots=worker.slots_of(request), reason=Reason(kind=ReasonKind.CLIENT_GONE))
