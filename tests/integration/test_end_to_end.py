"""The whole stack as its users meet it: curl, the official openai client, grpcurl, `perdure ctl`, on a real cluster."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.cluster import ROOT, Cluster, eventually
from tests.support.streams import start_wave

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

GRPCURL = Path(sys.executable).parent / "grpcurl"
PERDURE = Path(sys.executable).parent / "perdure"


def client(cluster: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url()}/v1", api_key="none", max_retries=0)


async def command(*arguments: str | Path, **environment: str) -> str:
    """Run a program; its output. A failure shows what it printed."""
    process = await asyncio.create_subprocess_exec(
        *map(str, arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, f"{arguments} exited with {process.returncode}:\n{output.decode()}"
    return output.decode()


async def ctl(cluster: Cluster, *arguments: str) -> str:
    """`perdure ctl` against the cluster."""
    return await command(PERDURE, "ctl", *arguments, PERDURE_ADDRESS=cluster.address())


async def test_models_are_listed(cluster: Cluster) -> None:
    models = await client(cluster).models.list()
    assert [model.id for model in models.data] == ["tiny"]


async def test_completion_streamed_and_whole_are_the_same(cluster: Cluster) -> None:
    api = client(cluster)
    request: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    whole = await api.completions.create(**request)
    pieces = [event.choices[0].text async for event in await api.completions.create(**request, stream=True)]
    assert whole.choices[0].text == "".join(pieces)
    assert len(pieces) > 1
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24


async def test_chat_streamed_with_usage(cluster: Cluster) -> None:
    api = client(cluster)
    stream = await api.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Tell me of the sea."}],
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    events = [event async for event in stream]
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 12
    finishes = [event.choices[0].finish_reason for event in events if event.choices]
    assert finishes[-1] == "length"


async def test_two_choices_differ_and_a_seed_repeats(cluster: Cluster) -> None:
    api = client(cluster)
    request: dict[str, Any] = {
        "model": "tiny",
        "prompt": "Dice:",
        "max_tokens": 16,
        "temperature": 1.0,
        "n": 2,
        "seed": 7,
    }
    first, second = await api.completions.create(**request), await api.completions.create(**request)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert texts[0] != texts[1]
    other = await api.completions.create(**{**request, "seed": 8})
    assert [choice.text for choice in other.choices] != texts


async def test_logprobs_of_both_apis(cluster: Cluster) -> None:
    api = client(cluster)
    completion = await api.completions.create(model="tiny", prompt="Log", max_tokens=5, temperature=0, logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == completion.usage.completion_tokens  # type: ignore[union-attr]
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)
    chat = await api.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Log"}],
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content
    assert all(len(token.top_logprobs) == 2 for token in content)
    # greedy takes the most probable token
    assert all(token.logprob == pytest.approx(max(top.logprob for top in token.top_logprobs)) for token in content)


async def test_a_stop_string_ends_the_text_before_it(cluster: Cluster) -> None:
    api = client(cluster)
    request: dict[str, Any] = {
        "model": "tiny",
        "prompt": "Count",
        "max_tokens": 40,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    text = (await api.completions.create(**request)).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = await api.completions.create(**request, stop=[stop])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


async def test_a_client_that_goes_away_frees_its_sequence(cluster: Cluster) -> None:
    body = {"model": "tiny", "prompt": "Forever", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient() as http, http.stream("POST", f"{cluster.url()}/v1/completions", json=body) as reply:
        # Held: an iterator that is let go closes the response.
        lines = reply.aiter_lines()
        while not (await anext(lines)).startswith("data: "):
            pass

        async def running() -> int:
            return sum(row["running"] for row in (await cluster.status())["replicas"])

        await eventually("the request runs", running)
        await lines.aclose()

    async def idle() -> bool:
        return all(row["running"] + row["waiting"] == 0 for row in (await cluster.status())["replicas"])

    await eventually("its sequence is freed", idle)


BAD_REQUESTS: list[tuple[str, dict[str, Any] | str, int, str]] = [
    ("/v1/completions", "{not json", 400, "JSON"),
    ("/v1/completions", {"model": "none such", "prompt": "x"}, 404, "none such"),
    ("/v1/completions", {"model": "tiny"}, 400, "prompt"),
    ("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
    ("/v1/completions", {"model": "tiny", "prompt": "x", "temperature": -0.5}, 400, "temperature"),
    ("/v1/completions", {"model": "tiny", "prompt": "x", "top_p": 1.5}, 400, "top_p"),
    ("/v1/completions", {"model": "tiny", "prompt": "x", "n": 0}, 400, "n"),
    ("/v1/completions", {"model": "tiny", "prompt": "x " * 20_000, "max_tokens": 5}, 400, "context"),
    ("/v1/completions", {"model": "tiny", "prompt": [1, -5]}, 400, "prompt"),
    ("/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user"}]}, 400, "content"),
    ("/v1/completions", {"model": "tiny", "prompt": "x", "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ("/v1/nothing", {"model": "tiny"}, 404, "/v1/nothing"),
]


@pytest.mark.parametrize(("path", "body", "status", "word"), BAD_REQUESTS, ids=lambda value: str(value)[:40])
async def test_bad_requests_are_refused_each_with_its_own_message(
    cluster: Cluster, path: str, body: dict[str, Any] | str, status: int, word: str
) -> None:
    async with httpx.AsyncClient() as http:
        content = body if isinstance(body, str) else json.dumps(body)
        reply = await http.post(f"{cluster.url()}{path}", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"] or word == error["param"], error


async def test_health_ready_and_metrics(cluster: Cluster) -> None:
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{cluster.url()}/health")).status_code == 200
        assert (await http.get(f"{cluster.url()}/ready")).status_code == 200
        metrics = (await http.get(f"{cluster.url()}/metrics")).text
    assert "# TYPE perdure_" in metrics


async def test_grpcurl_lists_describes_checks_and_generates(cluster: Cluster) -> None:
    services = await command(GRPCURL, "-plaintext", cluster.address(), "list")
    for service in (
        "perdure.v1.Admin",
        "perdure.v1.Inference",
        "perdure.v1.Session",
        "grpc.health.v1.Health",
        "grpc.channelz.v1.Channelz",
    ):
        assert service in services
    described = await command(GRPCURL, "-plaintext", cluster.address(), "describe", "perdure.v1.Inference")
    assert "rpc Generate" in described
    health = await command(GRPCURL, "-plaintext", cluster.address(), "grpc.health.v1.Health/Check")
    assert '"SERVING"' in health
    named = ("-d", '{"service": "perdure.v1.Inference"}', cluster.address(), "grpc.health.v1.Health/Check")
    assert '"SERVING"' in await command(GRPCURL, "-plaintext", *named)
    request = json.dumps(
        {
            "model": "tiny",
            "prompt": "Hello",
            "n": 1,
            "sampling": {"temperature": 0, "max_tokens": 5, "ignore_eos": True},
        }
    )
    generated = await command(GRPCURL, "-plaintext", "-d", request, cluster.address(), "perdure.v1.Inference/Generate")
    assert "FINISH_REASON_LENGTH" in generated
    status = json.loads(await command(GRPCURL, "-plaintext", cluster.address(), "perdure.v1.Admin/Status"))
    assert status["leader"]["term"]


async def test_any_control_plane_answers_for_the_leader(cluster: Cluster) -> None:
    answers = [await cluster.status(name) for name in cluster.controlplanes]
    assert len({answer["leader"]["term"] for answer in answers}) == 1
    assert all(len(answer["nodes"]) == 2 for answer in answers)


async def test_ctl_status_json_has_what_programs_need(cluster: Cluster) -> None:
    status = json.loads(await ctl(cluster, "status", "--json"))
    assert {"id", "pid", "address", "term"} <= set(status["leader"])
    assert {"id", "host", "pid", "state", "ranks"} <= set(status["nodes"][0])
    assert {"rank", "pid", "device", "state", "replica", "epoch"} <= set(status["nodes"][0]["ranks"][0])
    assert {"id", "state", "epoch", "running", "waiting", "free_blocks"} <= set(status["replicas"][0])
    assert {"id", "pid", "url"} <= set(status["gateways"][0])


async def test_drain_moves_streams_and_undrain_brings_the_node_back(cluster: Cluster) -> None:
    await ctl(cluster, "drain", "w0")

    async def phase_of(node: str) -> str:
        return {row["id"]: row["phase"] for row in (await cluster.status())["nodes"]}[node]

    async def drained() -> bool:
        return await phase_of("w0") in ("NODE_PHASE_DRAINING", "NODE_PHASE_LEFT")

    await eventually("w0 drains", drained)
    completion = await client(cluster).completions.create(model="tiny", prompt="Still here", max_tokens=4)
    assert completion.choices[0].text
    await ctl(cluster, "undrain", "w0")
    await cluster.wait_ready()
    assert await phase_of("w0") == "NODE_PHASE_LIVE"
    events = await ctl(cluster, "events")
    assert "w0" in events
    assert "drain" in events


async def test_cancel_ends_a_stream_with_a_reason(cluster: Cluster) -> None:
    body = {"model": "tiny", "prompt": "Cancel me", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream("POST", f"{cluster.url()}/v1/completions", json=body) as reply,
    ):
        lines = reply.aiter_lines()
        async for line in lines:
            if line.startswith("data: "):
                break
        listed = json.loads(await ctl(cluster, "requests", "--json"))
        (request,) = listed if isinstance(listed, list) else listed["requests"]
        await ctl(cluster, "cancel", request["id"])
        rest = [line async for line in lines if line.startswith("data: ")]
    assert any("cancel" in line.lower() for line in rest)


async def test_a_deleted_deployment_ends_its_streams_and_stays_away(cluster: Cluster) -> None:
    """Also for a new leader, whose own file describes it."""
    leader = await cluster.leader()
    other = next(name for name in cluster.controlplanes if name != leader.name)
    wave = start_wave(cluster.address(other), cluster.url(other), 4, 3000)
    await wave.reach(2)
    address = {"PERDURE_ADDRESS": cluster.address(other)}
    assert await command(PERDURE, "ctl", "delete", "main", **address) == "deployment main deleted\n"
    for stream in await asyncio.wait_for(wave.finish(), 30):
        assert not stream.finish
        assert stream.error.endswith("no deployment main")
    with pytest.raises(AssertionError, match="no deployment main"):
        await command(PERDURE, "ctl", "delete", "main", **address)
    leader.kill()
    leader.start()

    async def led() -> dict[str, Any]:
        status = await cluster.status(other)
        return status if status.get("leader", {}).get("phase") == "LEADER_PHASE_LEADING" else {}

    status = await eventually("another one leads", led)
    assert status["leader"]["id"] == other
    assert not status["deployments"]
    assert not status["replicas"]
    assert await ctl(cluster, "apply", "-f", str(cluster.folder / "cluster.yaml")) == "main: created\n"
    await cluster.wait_ready()
