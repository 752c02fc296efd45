"""Pieces wait for the client's task, and none is left behind."""

from __future__ import annotations

import asyncio
from array import array
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from controlplane.gateway.feed import Feed, JournalSink
from controlplane.gateway.messages import Deliver, Failed, Failure
from controlplane.gateway.metrics import GatewayMetrics, RequestClock
from controlplane.gateway.text_stream import Piece, TextOptions, TextStream
from controlplane.gateway.tokenizer import ModelTokenizer
from controlplane.runtime.clock import SystemClock
from controlplane.runtime.ids import Slot
from controlplane.runtime.messages.serve import Finish, FinishReason
from tests.support.tokenizers import write_model
from tests.unit.controlplane.gateway.builders import WHY, R


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    folder: Path = tmp_path_factory.mktemp("model")
    return ModelTokenizer(write_model(folder))


def sink(feed: Feed, tokenizer: ModelTokenizer, options: TextOptions, stopped: list[int] | None = None) -> JournalSink:
    clock = RequestClock(GatewayMetrics(CollectorRegistry()), SystemClock())
    text = TextStream(0, [], tokenizer, options)
    return JournalSink(
        R, feed, [text], clock, lambda _, choice: (stopped if stopped is not None else []).append(choice)
    )


def deliver(tokens: list[int], first: int = 0, finish: FinishReason | None = None, stop_id: int | None = None):
    end = Finish(slot=Slot(1), reason=finish, stop_id=stop_id) if finish else None
    return Deliver(R, 0, first, array("I", tokens), (), end)


async def test_what_is_pushed_while_the_client_writes_is_taken_before_the_end():
    feed = Feed(keepalive_s=60)
    feed.open_choices = 1
    feed.push(Piece(0, "a"))
    assert [piece.text for piece in await feed.news()] == ["a"]
    feed.push(Piece(0, "b", finish="length"))
    assert not feed.over
    assert [piece.text for piece in await feed.news()] == ["b"]
    assert feed.over
    feed.close()


async def test_a_failure_lets_the_tokens_before_it_through():
    feed = Feed(keepalive_s=60)
    feed.open_choices = 1
    feed.push(Piece(0, "a"))
    feed.fail(Failed(R, Failure.RETRIES, WHY))
    assert not feed.over
    assert len(await feed.news()) == 1
    assert feed.over
    feed.close()


async def test_silence_is_broken_by_empty_news():
    feed = Feed(keepalive_s=0.01)
    assert await asyncio.wait_for(feed.news(), 10) == []
    feed.close()


async def test_a_stop_string_ends_its_choice_once(tokenizer: ModelTokenizer):
    feed, stopped = Feed(60), list[int]()
    one = sink(feed, tokenizer, TextOptions(stops=("lazy",)), stopped)
    ids = tokenizer.encode("the lazy dog", add_special_tokens=False)
    one.deliver(deliver(ids))
    one.deliver(deliver(ids, len(ids), FinishReason.LENGTH))
    (piece,) = await feed.news()
    assert (piece.text, piece.finish, piece.stop_reason) == ("the ", "stop", "lazy")
    assert stopped == [0]
    assert one.complete
    assert one.tokens < len(ids)
    feed.close()


async def test_a_stop_string_with_the_workers_own_finish_needs_no_cancel(tokenizer: ModelTokenizer):
    feed, stopped = Feed(60), list[int]()
    one = sink(feed, tokenizer, TextOptions(stops=("dog",)), stopped)
    one.deliver(deliver(tokenizer.encode("dog", add_special_tokens=False), 0, FinishReason.LENGTH))
    assert stopped == []
    assert (await feed.news())[0].finish == "stop"
    feed.close()


async def test_stop_strings_wait_for_min_tokens(tokenizer: ModelTokenizer):
    feed = Feed(60)
    ids = tokenizer.encode("dog dog", add_special_tokens=False)
    half = len(tokenizer.encode("dog", add_special_tokens=False))
    one = sink(feed, tokenizer, TextOptions(stops=("dog",), min_tokens=half))
    one.deliver(deliver(ids))
    assert (await feed.news())[0].text == "dog "
    feed.close()


@pytest.mark.parametrize(("stop_id", "include", "text", "reason"), [(1, False, "a", None), (70, False, "a", 70)])
async def test_the_token_that_ends_a_text_is_not_part_of_it(
    tokenizer: ModelTokenizer, stop_id: int, include: bool, text: str, reason: int | None
):
    feed = Feed(60)
    one = sink(feed, tokenizer, TextOptions(include_stop=include))
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    one.deliver(deliver([a, stop_id], 0, FinishReason.STOP, stop_id))
    (piece,) = await feed.news()
    assert (piece.text, piece.finish, piece.stop_reason) == (text, "stop", reason)
    assert one.tokens == 2
    feed.close()


async def test_only_the_first_prefills_cache_hits_count(tokenizer: ModelTokenizer):
    feed = Feed(60)
    one = sink(feed, tokenizer, TextOptions())
    one.started(0)
    one.started(16)
    one.deliver(deliver([70]))
    one.started(32)
    assert feed.cached_tokens == 16
    feed.close()
