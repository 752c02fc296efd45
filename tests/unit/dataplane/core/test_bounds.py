"""Nothing grows without a bound, and nobody who does not read holds anyone up."""

from __future__ import annotations

from controlplane.runtime.ids import RequestId
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.serve import OpenCode, OpenRefused, SlotsLost
from dataplane.core.messages import Depart, StopAsked
from dataplane.core.state import RENDER_BYTES_MAX, Limits
from tests.scenario.worker.model import TIMINGS, Worker, sent, serving

STOP = StopAsked(Reason(kind=ReasonKind.ADMIN))


def held(worker: Worker) -> list[str]:
    return list(worker.state.requests)


def refusals(worker: Worker, request: str, **options: int | bytes) -> list[OpenCode]:
    effects = worker.open("g", request, **options)
    return [body.code for body in sent(effects, worker, "g") if isinstance(body, OpenRefused)]


def test_the_oldest_shadow_that_no_gateway_holds_goes_first() -> None:
    worker = serving(limits=Limits(shadows=3))
    for name in ("a", "b"):
        worker.open("g", name)
    worker.disconnect("g")
    worker.connect("g", "another process")
    worker.open("g", "c")
    worker.open("g", "d")
    assert held(worker) == ["b", "c", "d"]
    worker.open("g", "e")
    assert held(worker) == ["c", "d", "e"]
    assert refusals(worker, "f") == [OpenCode.FULL]


def test_the_bytes_of_shadows_are_bounded_too() -> None:
    worker = serving(limits=Limits(shadow_bytes=1000))
    assert refusals(worker, "a", render=bytes(900)) == []
    assert refusals(worker, "b", render=bytes(900)) == [OpenCode.FULL]


def test_a_render_blob_is_bounded() -> None:
    assert refusals(serving(), "a", render=bytes(RENDER_BYTES_MAX + 1)) == [OpenCode.INVALID]


def test_a_lost_shadow_goes_after_its_grace() -> None:
    worker = serving()
    worker.open("g", "a")
    worker.exits("cpu:0", signal=9)
    worker.wait(TIMINGS.resume_grace - 1)
    assert held(worker) == ["a"]
    worker.wait(1.1)
    assert held(worker) == []


def test_a_leaving_daemon_goes_at_its_deadline_whoever_does_not_read() -> None:
    worker = serving()
    worker.open("g", "a")
    worker.step_ends("cpu:0", 1, {("a", 0): (0, range(3))})
    worker.feed(STOP)
    assert not any(isinstance(effect, Depart) for effect in worker.wait(TIMINGS.drain - 1))
    effects = worker.wait(1.2)
    assert isinstance(effects[-1], Depart) or any(isinstance(effect, Depart) for effect in effects)
    lost = [body for body in sent(effects, worker, "g") if isinstance(body, SlotsLost)]
    assert [loss.suspect for loss in lost] == [False]


def test_an_idle_daemon_goes_at_once() -> None:
    worker = serving()
    assert any(isinstance(effect, Depart) for effect in worker.feed(STOP) + worker.flush("g") + worker.tick())


def test_a_request_is_one_whatever_its_attempts() -> None:
    worker = serving()
    for attempt in range(1, 20):
        worker.open("g", "a", attempt=attempt)
    assert held(worker) == ["a"]
    assert len(worker.state.sequences) == 1
    assert worker.state.requests[RequestId("a")].attempt == 19
