"""The OpenAI API over real sockets, driven by the official client and by hand."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from controlplane.gateway.gateway import Gateway
from controlplane.gateway.limits import GatewayLimits
from controlplane.gateway.params import choice_seeds
from controlplane.runtime.clock import SystemClock
from controlplane.runtime.errors import Rejected
from controlplane.runtime.ids import Incarnation, draw_id
from controlplane.runtime.messages.route import Outcome
from tests.support.gateway import Stage, free_port, staged, until
from tests.support.leader_peer import LeaderBook
from tests.support.serving_peer import CLUSTER, MODEL, logprob_of, reference
from tests.support.tokenizers import write_model

HELLO = "The quick brown"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stage(folder: Path) -> AsyncIterator[Stage]:
    async with staged(folder) as made:
        yield made


def expected_text(stage: Stage, prompt: bytes, seed: int, count: int) -> str:
    """What a client must see: the reference tokens as text, half a character at the end left out."""
    return stage.tokenizer.decode(reference(prompt, seed, count, stage.tokenizer.vocab_size)).rstrip("\ufffd")


class TestAnswers:
    async def test_models(self, stage: Stage):
        client = stage.openai()
        listed = await client.models.list()
        assert [model.id for model in listed.data] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError) as refusal:
            await client.models.retrieve("other")
        assert refusal.value.code == "model_not_found"

    async def test_a_completion_is_the_reference(self, stage: Stage):
        answer = await stage.openai().completions.create(model=MODEL, prompt=HELLO, max_tokens=40, seed=7)
        assert answer.choices[0].text == expected_text(stage, stage.prompt(HELLO), 7, 40)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(stage.prompt(HELLO)) // 4, 40)
        await until(lambda: stage.leader.ends, "the end told to the leader")
        assert [(end.outcome, end.tokens) for end in stage.leader.ends] == [(Outcome.FINISHED, 40)]
        await until(lambda: any(worker.ended for worker in stage.workers), "the shadow freed")

    async def test_a_stream_is_the_same_text_in_whole_characters(self, stage: Stage):
        stream = await stage.openai().completions.create(
            model=MODEL, prompt=HELLO, max_tokens=60, seed=7, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        assert text == expected_text(stage, stage.prompt(HELLO), 7, 60)
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 60

    async def test_a_chat(self, stage: Stage):
        client = stage.openai()
        messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Grüße 你好"}]}]
        whole = await client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=30, seed=3)
        stream = await client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=30, seed=3, stream=True
        )
        deltas = [chunk.choices[0].delta async for chunk in stream]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
        ids = stage.tokenizer.encode("<s><|user|>Grüße 你好<|end|><|assistant|>", add_special_tokens=False)
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == len(ids)

    async def test_n_choices_have_seeds_of_their_own(self, stage: Stage):
        answer = await stage.openai().completions.create(model=MODEL, prompt=HELLO, max_tokens=20, n=3, seed=5)
        seeds = choice_seeds(5, 3)
        expected = [expected_text(stage, stage.prompt(HELLO), seed, 20) for seed in seeds]
        assert [choice.text for choice in answer.choices] == expected
        assert len(set(expected)) == 3

    async def test_several_prompts_and_prompts_of_ids(self, stage: Stage):
        client = stage.openai()
        ids = stage.tokenizer.encode("one fox", add_special_tokens=True)
        texts = await client.completions.create(model=MODEL, prompt=["one fox", "lazy dog"], max_tokens=8, n=2, seed=1)
        lists = await client.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=8, seed=1)
        assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
        assert lists.choices[0].text == lists.choices[1].text == texts.choices[0].text
        assert texts.choices[2].text == expected_text(stage, stage.prompt("lazy dog"), 1, 8)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_stop_string_is_never_shown_and_frees_the_sequence(self, stage: Stage, stream: bool):
        text = expected_text(stage, stage.prompt(HELLO), 7, 400)
        stop = text[30:34]
        body = {"model": MODEL, "prompt": HELLO, "max_tokens": 400, "seed": 7, "stop": [stop], "stream": stream}
        shown, finish = await _completion(stage, body)
        assert shown == text[: text.find(stop)]
        assert finish == "stop"
        await until(lambda: any(worker.cancelled for worker in stage.workers), "the cancel")
        assert not any(worker.sequences for worker in stage.workers)

    async def test_a_stop_string_is_shown_if_asked_for(self, stage: Stage):
        text = expected_text(stage, stage.prompt(HELLO), 7, 400)
        stop = text[30:34]
        body = {"model": MODEL, "prompt": HELLO, "max_tokens": 400, "seed": 7, "stop": stop}
        shown, _ = await _completion(stage, {**body, "include_stop_str_in_output": True})
        assert shown == text[: text.find(stop) + len(stop)]

    async def test_a_stop_token_ends_the_text_before_it(self, stage: Stage):
        tokens = reference(stage.prompt(HELLO), 7, 30, stage.tokenizer.vocab_size)
        place = next(place for place in range(8, 30) if tokens[place] not in tokens[:place])
        body = {"model": MODEL, "prompt": HELLO, "max_tokens": 30, "seed": 7, "stop_token_ids": [tokens[place]]}
        status, _, answer = await stage.post("/v1/completions", body)
        choice: Any = answer["choices"][0]  # type: ignore[index]
        assert status == 200
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", tokens[place])
        assert choice["text"] == stage.tokenizer.decode(tokens[:place]).rstrip("\ufffd")

    async def test_logprobs_of_a_chat(self, stage: Stage):
        answer = await stage.openai().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=12,
            seed=2,
            logprobs=True,
            top_logprobs=3,
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(logprobs.content) == 12
        raw = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
        assert raw.decode(errors="ignore") == (answer.choices[0].message.content or "").replace("\ufffd", "")
        assert all(len(entry.top_logprobs) == 3 for entry in logprobs.content)

    async def test_logprobs_of_a_streamed_chat_are_all_there(self, stage: Stage):
        stream = await stage.openai().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=12, seed=2, logprobs=True, stream=True
        )
        entries = [chunk.choices[0].logprobs async for chunk in stream]
        assert sum(len(entry.content or []) for entry in entries if entry is not None) == 12

    async def test_an_echo_with_logprobs_shows_the_prompts_too(self, stage: Stage):
        answer = await stage.openai().completions.create(
            model=MODEL, prompt=HELLO, max_tokens=6, seed=2, logprobs=2, echo=True, n=2
        )
        prompt = stage.tokenizer.encode(HELLO, add_special_tokens=True)
        for choice, seed in zip(answer.choices, choice_seeds(2, 2), strict=True):
            logprobs = choice.logprobs
            assert logprobs is not None
            tokens = [*prompt, *reference(stage.prompt(HELLO), seed, 6, stage.tokenizer.vocab_size)]
            assert choice.text.startswith(HELLO)
            assert logprobs.token_logprobs == [None, *(logprob_of(token) for token in tokens[1:])]
            offsets = logprobs.text_offset or []
            assert offsets == sorted(offsets)
            assert offsets[len(prompt)] == len(HELLO)
            assert logprobs.top_logprobs is not None
            assert all(len(top or {}) in (2, 3) for top in logprobs.top_logprobs[1:])

    @pytest.mark.parametrize("stream", [False, True])
    async def test_an_echo_alone_scores_a_prompt(self, stage: Stage, stream: bool):
        body = {"model": MODEL, "prompt": HELLO, "max_tokens": 0, "logprobs": 1, "echo": True, "stream": stream}
        shown, finish = await _completion(stage, body)
        assert (shown, finish) == (HELLO, "length")

    async def test_without_a_seed_every_request_draws_its_own(self, stage: Stage):
        body = {"model": MODEL, "prompt": HELLO, "max_tokens": 20}
        assert (await _completion(stage, body)) != (await _completion(stage, body))

    async def test_sampling_parameters_reach_the_worker(self, stage: Stage):
        body = {
            "model": MODEL,
            "prompt": HELLO,
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 11,
            "min_p": 0.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "repetition_penalty": 1.1,
            "logit_bias": {"20": -5},
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "seed": -1,
            "priority": 4,
        }
        status, _, _ = await stage.post("/v1/completions", body)
        assert status == 200
        opened = next(worker.opened[0] for worker in stage.workers if worker.opened)
        sampling = opened.sampling
        assert sampling.temperature == pytest.approx(0.5)
        assert (sampling.top_k, sampling.max_tokens, sampling.min_tokens) == (11, 3, 2)
        assert (sampling.ignore_eos, sampling.stop_ids) == (True, (9,))
        assert dict(sampling.logit_bias) == {20: -5.0}
        assert opened.permit.priority == 4
        assert opened.choices[0].seed == 2**64 - 1
        assert json.loads(opened.render)["kind"] == "completion"


async def _completion(stage: Stage, body: dict[str, Any]) -> tuple[str, str]:
    """Text and finish reason of choice 0, streamed or not."""
    async with stage.http.post(f"{stage.gateway.url}/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        if not body.get("stream"):
            choice = (await answer.json())["choices"][0]
            return choice["text"], choice["finish_reason"]
        events = [line[6:] async for line in answer.content if line.startswith(b"data: ")]
    assert events[-1].strip() == b"[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": MODEL, "prompt": HELLO}


class TestServer:
    async def test_a_second_bind_is_a_clear_error(self, folder: Path):
        async with staged(folder, workers=0) as stage:
            port = int(stage.gateway.url.rsplit(":", 1)[1])
            second = Gateway(
                "g2",
                Incarnation(draw_id()),
                CLUSTER,
                stage.timings,
                LeaderBook(),
                "127.0.0.1",
                port,
                GatewayLimits(),
                SystemClock(),
            )
            with pytest.raises(Rejected, match=f"127.0.0.1:{port}"):
                await second.start()

    async def test_it_listens_where_it_was_told_to(self, folder: Path):
        port = free_port()
        gateway = Gateway(
            "g",
            Incarnation(draw_id()),
            CLUSTER,
            (await _timings(folder)),
            LeaderBook(),
            "127.0.0.1",
            port,
            GatewayLimits(stop_grace_s=0.1),
            SystemClock(),
        )
        await gateway.start()
        assert gateway.url == f"http://127.0.0.1:{port}"
        await gateway.stop()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0

    async def test_health_and_readiness(self, folder: Path):
        async with staged(folder, workers=0) as stage:
            async with stage.http.get(f"{stage.gateway.url}/health") as answer:
                assert answer.status == 200
            async with stage.http.get(f"{stage.gateway.url}/ready") as answer:
                assert answer.status == 503
                assert (await answer.json())["reason"]

    async def test_readiness_follows_the_workers(self, stage: Stage):
        assert stage.gateway.ready()[0]
        for worker in stage.workers:
            worker.silent = True
        await until(lambda: not stage.gateway.ready()[0], "the silence noticed")
        assert "does not answer" in stage.gateway.ready()[1]

    async def test_metrics(self, stage: Stage):
        await stage.post("/v1/completions", {**PROMPT, "max_tokens": 5})
        async with stage.http.get(f"{stage.gateway.url}/metrics") as answer:
            text = await answer.text()
        assert 'perdure_gateway_requests_total{outcome="finished"} 1.0' in text
        assert "perdure_gateway_tokens_delivered_total 5.0" in text
        assert "perdure_gateway_time_to_first_token_seconds_count 1.0" in text
        assert 'perdure_gateway_worker_streams{state="up"} 2.0' in text

    async def test_nagle_is_off_on_the_servers_side(self, stage: Stage):
        """With Nagle every small chunk after the first waits for the peer's delayed acknowledgement: 40 ms each."""
        port = int(stage.gateway.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        ours = writer.get_extra_info("sockname")
        runner = stage.gateway._http._runner
        assert runner is not None
        assert runner.server is not None
        transports = [protocol.transport for protocol in runner.server.connections]
        served = next(one for one in transports if one is not None and one.get_extra_info("peername") == ours)
        assert served.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        writer.close()

    async def test_a_client_that_goes_away_frees_its_sequences(self, folder: Path):
        async with staged(folder, step_s=0.02) as stage:
            for path, body in (
                ("completions", {**PROMPT, "max_tokens": 400, "stream": True, "n": 2}),
                ("chat/completions", {**CHAT, "max_tokens": 400}),
            ):
                await _vanish(stage, path, body)
                await until(lambda: not any(worker.sequences for worker in stage.workers), "the sequences freed")
                await until(lambda: stage.leader.ends, "the end told")
                assert stage.leader.ends.pop().outcome is Outcome.CANCELLED

    async def test_a_quiet_stream_is_kept_alive_by_comments(self, folder: Path):
        async with staged(folder, limits=GatewayLimits(answer_s=0.05, keepalive_s=0.05, stop_grace_s=0.1)) as stage:
            for worker in stage.workers:
                worker.step_s = 1e9
            body = {**PROMPT, "stream": True}
            async with stage.http.post(f"{stage.gateway.url}/v1/completions", json=body) as answer:
                lines = [await answer.content.readline() for _ in range(4)]
            assert lines == [b": waiting\n"] * 4

    async def test_stopping_lets_streams_end_and_takes_nothing_new(self, folder: Path):
        async with staged(folder, step_s=0.01) as stage:
            stream = await stage.openai().completions.create(
                model=MODEL, prompt=HELLO, max_tokens=50, seed=7, stream=True
            )
            first = await anext(stream)
            stopping = asyncio.create_task(stage.gateway.stop())
            await asyncio.sleep(0)
            async with aiohttp.ClientSession() as fresh:
                with pytest.raises(aiohttp.ClientConnectorError):
                    await fresh.get(f"{stage.gateway.url}/health")
            text = first.choices[0].text + "".join([chunk.choices[0].text async for chunk in stream])
            assert text == expected_text(stage, stage.prompt(HELLO), 7, 50)
            await stopping


async def _timings(folder: Path) -> Any:
    async with staged(folder, workers=0) as stage:
        return stage.timings


async def _vanish(stage: Stage, path: str, body: dict[str, Any]) -> None:
    """Send a request on a raw socket, wait until it runs, close the socket."""
    port = int(stage.gateway.url.rsplit(":", 1)[1])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    await until(lambda: any(worker.sequences for worker in stage.workers), "the request running")
    writer.close()
