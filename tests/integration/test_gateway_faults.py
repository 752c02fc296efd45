"""Whatever breaks behind the gateway, a client sees the reference, each token once: real sockets, real breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import openai
import pytest

from controlplane.runtime.ids import RequestId
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.route import CancelRequest, MoveRequests, RouteCause
from controlplane.runtime.messages.serve import OpenCode
from tests.support.gateway import Stage, staged, until
from tests.support.leader_peer import LeaderPeer
from tests.support.serving_peer import MODEL, WorkerPeer, reference
from tests.support.tokenizers import write_model

TOKENS = 120
STREAMS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stage(folder: Path) -> AsyncIterator[Stage]:
    async with staged(folder, step_s=0.005) as made:
        yield made


def busy(stage: Stage) -> WorkerPeer:
    """A worker that has sequences in the middle of their answers."""
    return next(worker for worker in stage.workers if worker.sequences)


async def break_stream(stage: Stage) -> None:
    busy(stage).break_streams()


async def kill_worker(stage: Stage) -> None:
    await busy(stage).kill()


async def lose_rank(stage: Stage) -> None:
    busy(stage).lose(suspect=False)


async def close_replica(stage: Stage) -> None:
    worker = busy(stage)
    worker.sequences.clear()
    stage.leader.close_replica(worker)


async def move_requests(stage: Stage) -> None:
    worker = busy(stage)
    reason = Reason(kind=ReasonKind.DRAINING, text="drain")
    stage.leader.tell(MoveRequests(replica=worker.replica, epoch=worker.epoch, deadline_ms=0, reason=reason))


async def forget_sequences(stage: Stage) -> None:
    worker = busy(stage)
    worker.sequences.clear()
    worker.break_streams()


async def silence_worker(stage: Stage) -> None:
    busy(stage).silent = True


async def change_leader(stage: Stage) -> None:
    await stage.leader.kill()
    successor = LeaderPeer(stage.timings, stage.leader.model_path, term=2)
    successor.workers = list(stage.workers)
    await successor.start()
    stage.extras.append(successor)
    stage.book.set(successor.address, 2)
    await until(lambda: successor.inventories, "the inventory")


FAULTS = [
    break_stream,
    kill_worker,
    lose_rank,
    close_replica,
    move_requests,
    forget_sequences,
    silence_worker,
    change_leader,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_streams_are_the_reference_whatever_breaks(stage: Stage, fault: Callable[[Stage], Awaitable[None]]):
    client = stage.openai()

    async def run(seed: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt="The quick", max_tokens=TOKENS, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    running = [asyncio.create_task(run(seed)) for seed in range(STREAMS)]
    await until(lambda: all(w.steps_sent > 20 for w in stage.workers), "streams in the middle of their answers")
    await fault(stage)
    texts = await asyncio.gather(*running)
    prompt, vocab = stage.prompt("The quick"), stage.tokenizer.vocab_size
    for seed, text in enumerate(texts):
        assert text == stage.tokenizer.decode(reference(prompt, seed, TOKENS, vocab)).rstrip("\ufffd")


async def test_a_broken_stream_is_synced_without_a_new_attempt(stage: Stage):
    answer = asyncio.create_task(_answer(stage, TOKENS))
    await until(lambda: any(worker.steps_sent > 10 for worker in stage.workers), "the middle of an answer")
    worker = busy(stage)
    worker.break_streams()
    await answer
    assert any(sync.slots for sync in worker.synced)
    assert [entry.attempt for entry in stage.leader.asked] == [1]


async def test_a_replay_carries_what_was_delivered_and_excludes_the_lost(stage: Stage):
    answer = asyncio.create_task(_answer(stage, TOKENS))
    await until(lambda: any(worker.steps_sent > 10 for worker in stage.workers), "the middle of an answer")
    worker = busy(stage)
    await worker.kill()
    await answer
    first, second = stage.leader.asked
    assert (second.attempt, second.cause) == (2, RouteCause.LOST)
    assert [place.replica for place in second.exclude] == [worker.replica]
    assert second.delivered_tokens > 0
    assert first.request == second.request
    replay = next(other for other in stage.workers if other is not worker).opened[0]
    assert len(replay.choices[0].delivered) == 4 * second.delivered_tokens


async def test_a_request_that_kills_its_engines_ends_with_an_honest_error(stage: Stage):
    stream = await stage.openai().completions.create(model=MODEL, prompt="x", max_tokens=400, stream=True)

    async def read() -> None:
        async for _ in stream:
            pass

    reading = asyncio.create_task(read())
    for crash in (1, 2):
        await until(lambda: any(worker.sequences for worker in stage.workers), "the request running")
        busy(stage).lose(suspect=True)
        if crash == 1:
            await until(lambda: len(stage.leader.asked) == 2, "the replay asked for")
    with pytest.raises(openai.APIError, match="ended 2 engines"):
        await reading
    assert stage.leader.asked[1].crashes == 1


async def test_a_full_worker_is_left_for_another(stage: Stage):
    stage.workers[0].refuse_with = OpenCode.FULL
    for _ in range(2):
        await _answer(stage, 5)
    assert len(stage.workers[1].opened) == 2


async def test_an_operators_cancel_reaches_the_client(stage: Stage):
    answer = asyncio.create_task(_answer(stage, 400))
    await until(lambda: any(worker.sequences for worker in stage.workers), "the request running")
    request = RequestId(stage.leader.asked[0].request)
    stage.leader.tell(CancelRequest(request=request, reason=Reason(kind=ReasonKind.ADMIN, text="an operator asked")))
    with pytest.raises(openai.APIStatusError, match="an operator asked"):
        await answer
    await until(lambda: not any(worker.sequences for worker in stage.workers), "the sequences freed")


async def test_a_leader_of_a_lower_term_is_refused(stage: Stage):
    """A zombie's frames are dropped once a higher term was heard of."""
    stage.book.hint("", 5)  # type: ignore[arg-type]
    await until(lambda: "no leading coordinator" in stage.gateway.ready()[1], "the session ended")


async def test_a_silent_leader_is_left_and_found_again(stage: Stage):
    stage.leader.mute = True
    await until(lambda: len(stage.leader.inventories) >= 2, "a second session")
    stage.leader.mute = False
    await _answer(stage, 5)


async def test_new_requests_wait_for_a_leader(stage: Stage):
    await stage.leader.kill()
    stage.book.set("", 1)
    answer = asyncio.create_task(_answer(stage, 5))
    await asyncio.sleep(0)
    await change_leader(stage)
    assert await answer


async def _answer(stage: Stage, tokens: int) -> str:
    done = await stage.openai().completions.create(model=MODEL, prompt="The quick", max_tokens=tokens, seed=1)
    return done.choices[0].text
