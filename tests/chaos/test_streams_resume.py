"""A gateway is killed under its clients: they go on at another one, and have every token once."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest

from controlplane.runtime.ids import draw_id
from protos.perdure.v1 import inference_pb2, inference_pb2_grpc
from tests.support.cluster import Cluster, Daemon, eventually
from tools.client import StreamClient

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.asyncio(loop_scope="session")]

TOKENS = 160
PATIENCE_S = 60.0
"""Beyond the time for which a new leader says that others may hold a stream."""


@dataclass
class Answer:
    """What a client has of one response."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    finishes: dict[int, str] = field(default_factory=dict)
    roles: int = 0
    usage: dict[str, Any] | None = None
    chunks: int = 0

    def take(self, chunk: dict[str, Any]) -> None:
        self.chunks += 1
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            delta = choice.get("delta", {})
            self.roles += "role" in delta
            self.texts[choice["index"]] += delta.get("content") or choice.get("text", "")
            if choice["finish_reason"]:
                assert choice["index"] not in self.finishes, "an end is told once"
                self.finishes[choice["index"]] = choice["finish_reason"]

    def told(self) -> tuple[object, ...]:
        """All that must be as in an undisturbed run."""
        counts = self.usage and (self.usage["prompt_tokens"], self.usage["completion_tokens"])
        return dict(self.texts), self.finishes, self.roles, counts


def requests() -> list[tuple[str, dict[str, Any]]]:
    """A plain completion, sampled choices, several prompts with an echo, a chat, log probabilities."""
    common = {"model": "tiny", "ignore_eos": True, "stream_options": {"include_usage": True}, "temperature": 0}
    sampled = {**common, "temperature": 1.0, "seed": 5, "n": 2}
    chat = [{"role": "user", "content": "Tell me of the sea."}]
    completions = [
        {**common, "prompt": "Once upon a time", "max_tokens": TOKENS},
        {**sampled, "prompt": "The dice say ünïcödé:", "max_tokens": TOKENS},
        {**common, "prompt": ["One", "Two"], "max_tokens": TOKENS, "echo": True},
        {**common, "prompt": "Log", "max_tokens": TOKENS, "logprobs": 1},
    ]
    return [
        *(("/v1/completions", body) for body in completions),
        ("/v1/chat/completions", {**common, "messages": chat, "max_completion_tokens": TOKENS}),
    ]


async def converse(client: StreamClient, path: str, body: dict[str, Any], answer: Answer) -> None:
    async for chunk in client.stream(path, body):
        answer.take(chunk)


async def all_answers(cluster: Cluster, victim: Daemon | None = None) -> list[Answer]:
    """Every request through the client helper, the victim's gateway first; it is killed while all are under way."""
    names = sorted(cluster.controlplanes, key=lambda name: victim is None or name != victim.name)
    answers = [Answer() for _ in requests()]
    clients = [StreamClient([cluster.url(name) for name in names]) for _ in answers]
    async with asyncio.TaskGroup() as tasks:
        for client, (path, body), answer in zip(clients, requests(), answers, strict=True):
            tasks.create_task(converse(client, path, body, answer))
        if victim is not None:
            await eventually("all are under way", lambda: all(answer.chunks >= 20 for answer in answers))
            assert not any(answer.finishes for answer in answers)
            victim.kill()
    return answers


async def ready(http: aiohttp.ClientSession, url: str) -> None:
    """Wait until the gateway can serve."""

    async def answers() -> bool:
        async with http.get(f"{url}/ready") as response:
            return response.status == 200

    await eventually("the gateway is ready", answers)


@pytest.mark.parametrize("leads", [False, True], ids=["standby", "leader"])
async def test_a_gateway_is_killed_and_its_clients_go_on_elsewhere(cluster: Cluster, leads: bool) -> None:
    undisturbed = await all_answers(cluster)
    leader = await cluster.leader()
    victim = next(daemon for daemon in cluster.controlplanes.values() if (daemon is leader) == leads)
    resumed = await all_answers(cluster, victim)
    for (path, body), seen, expected in zip(requests(), resumed, undisturbed, strict=True):
        assert seen.told() == expected.told(), f"{path} {body}"
    victim.start()
    await cluster.wait_ready()


async def test_a_program_goes_on_at_another_gateway(cluster: Cluster) -> None:
    """Inference.Resume: token ids and text go on after what the client has."""
    leader = await cluster.leader()
    victim = next(daemon for daemon in cluster.controlplanes.values() if daemon is not leader)
    sampling = inference_pb2.SamplingOptions(max_tokens=TOKENS, ignore_eos=True, temperature=1, seed=7)
    request = inference_pb2.GenerateRequest(prompt="A program", sampling=sampling, n=2, request=draw_id())
    async with aiohttp.ClientSession() as http:
        await ready(http, cluster.url(victim.name))
    async with (
        grpc.aio.insecure_channel(cluster.address(leader.name)) as other,
        grpc.aio.insecure_channel(cluster.address(victim.name)) as first,
    ):
        asked = inference_pb2.GenerateRequest(prompt="A program", sampling=sampling, n=2)
        expected = [event async for event in inference_pb2_grpc.InferenceStub(other).Generate(asked)]
        seen: list[inference_pb2.GenerateResponse] = []
        with suppress(grpc.aio.AioRpcError):
            async for event in inference_pb2_grpc.InferenceStub(first).Generate(request):
                seen.append(event)
                if len(seen) == 40:
                    victim.kill()
        had = [sum(len(event.token_ids) for event in seen if event.choice == choice) for choice in (0, 1)]
        assert all(0 < count < TOKENS for count in had)
        positions = [inference_pb2.ChoicePosition(tokens=count) for count in had]
        resume = inference_pb2.InferenceResumeRequest(request=request.request, choices=positions)
        seen += [answer.event async for answer in inference_pb2_grpc.InferenceStub(other).Resume(resume)]
        assert by_choice(seen) == by_choice(expected)

        async def is_gone() -> bool:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                async for _ in inference_pb2_grpc.InferenceStub(other).Resume(resume):
                    pass
            # Others may hold it as far as a new leader knows.
            assert refusal.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)
            return refusal.value.code() is grpc.StatusCode.NOT_FOUND

        await eventually("its end was told, so it is held no more", is_gone, timeout=PATIENCE_S)
    victim.start()
    await cluster.wait_ready()


def by_choice(events: list[inference_pb2.GenerateResponse]) -> dict[int, tuple[list[int], str, list[int]]]:
    """Of each choice its token ids, checked to be in order, its text, and how it was told to have ended."""
    found: dict[int, tuple[list[int], str, list[int]]] = {}
    for event in events:
        tokens, text, finishes = found.get(event.choice, ([], "", []))
        assert event.first_index == len(tokens)
        ended = [event.finish_reason] if event.finish_reason else []
        found[event.choice] = ([*tokens, *event.token_ids], text + event.text, finishes + ended)
    return found


async def test_a_finished_stream_is_told_its_end_again(cluster: Cluster) -> None:
    """The gateway dies when the worker has all the tokens, and the client only some of them."""
    leader = await cluster.leader()
    victim = next(daemon for daemon in cluster.controlplanes.values() if daemon is not leader)
    url, other = cluster.url(victim.name), cluster.url(leader.name)
    body = {"model": "tiny", "prompt": "Short", "max_tokens": 40, "ignore_eos": True, "temperature": 0, "stream": True}
    async with aiohttp.ClientSession() as http:
        await ready(http, url)
        whole = await (await http.post(f"{other}/v1/completions", json={**body, "stream": False})).json()
        async with http.post(f"{url}/v1/completions", json=body) as response:
            stream = response.headers["x-perdure-stream"]
            lines: list[bytes] = []
            while sum(line.startswith(b"data: ") for line in lines) < 3:
                lines.append(await response.content.readline())
            victim.signal(signal.SIGSTOP)

            async def idle() -> bool:
                return all(
                    row["running"] + row["waiting"] == 0 for row in (await cluster.status(leader.name))["replicas"]
                )

            await eventually("the worker is done", idle)
            victim.kill()
        last = [line[4:].strip().decode() for line in lines if line.startswith(b"id: ")][-1]
        before = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith(b"data: "))
        headers = {"Last-Event-ID": last}
        async with http.get(f"{other}/v1/streams/{stream}", headers=headers) as response:
            assert response.status == 200, await response.text()
            chunks = [line[6:] async for line in response.content if line.startswith(b"data: ")]
        assert chunks[-1].strip() == b"[DONE]"
        rest = [json.loads(chunk)["choices"][0] for chunk in chunks[:-1]]
        assert before + "".join(choice["text"] for choice in rest) == whole["choices"][0]["text"]
        assert rest[-1]["finish_reason"] == "length"
        # Its end was told, so it is held no more; a stream that never was is answered alike.
        for gone in (stream, draw_id()):

            async def is_gone(gone: str = gone) -> bool:
                async with http.get(f"{other}/v1/streams/{gone}") as response:
                    assert response.status in (404, 503), await response.text()
                    return response.status == 404

            await eventually("it is held no more", is_gone, timeout=PATIENCE_S)
    victim.start()
    await cluster.wait_ready()
