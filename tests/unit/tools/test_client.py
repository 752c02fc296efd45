"""The client helper leaves a gateway that is stopped, or that reaches no worker, and goes on at another one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from tools.client import StreamClient, stream

STREAM = "a" * 32

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def gateway(*routes: web.RouteDef) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def events(*lines: bytes, then_hang: bool = False) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"x-perdure-stream": STREAM})
        await response.prepare(request)
        for line in lines:
            await response.write(line)
        if then_hang:
            await asyncio.Event().wait()
        return response

    return handler


def token(number: int) -> bytes:
    return f"id: {STREAM}:{number}\n".encode() + b"data: " + json.dumps({"n": number}).encode() + b"\n\n"


async def hang(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("an event that nobody sets")


async def healthy(_: web.Request) -> web.StreamResponse:
    return web.Response(text="ok")


async def collect(*urls: str) -> list[int]:
    client = StreamClient(urls, patience_s=5)
    return [chunk["n"] async for chunk in client.stream("/v1/completions", {"prompt": "x"})]


async def test_a_gateway_that_is_cut_off_is_left_for_another() -> None:
    resumed: list[str | None] = []

    async def resume(request: web.Request) -> web.StreamResponse:
        resumed.append(request.headers.get("Last-Event-ID"))
        return await events(token(2), b"data: [DONE]\n\n")(request)

    first = web.post("/v1/completions", events(token(1), b": cut off\n", then_hang=True))
    async with gateway(first) as apart, gateway(web.get(f"/v1/streams/{STREAM}", resume)) as other:
        assert await collect(apart, other) == [1, 2]
    assert resumed == [f"{STREAM}:1"]


async def test_a_gateway_is_not_left_before_another_has_the_stream() -> None:
    looks = 0

    async def refuse(_: web.Request) -> web.StreamResponse:
        nonlocal looks
        looks += 1
        return web.json_response({"error": {"message": "no worker answers"}}, status=503)

    first = events(token(1), b": cut off\n", b": cut off\n", token(2), b"data: [DONE]\n\n")
    refusing = web.get(f"/v1/streams/{STREAM}", refuse)
    async with gateway(web.post("/v1/completions", first)) as apart, gateway(refusing) as other:
        assert await collect(apart, other) == [1, 2]
    assert looks == 2


async def test_a_silent_gateway_is_left_for_another_that_has_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SILENCE_MAX_S", 0.05)
    first = web.post("/v1/completions", events(token(1), then_hang=True))
    resume = web.get(f"/v1/streams/{STREAM}", events(token(2), b"data: [DONE]\n\n"))
    async with gateway(first) as silent, gateway(resume) as other:
        assert await collect(silent, other) == [1, 2]


async def test_a_client_that_was_stopped_itself_does_not_leave_its_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have nothing: the stream is the first one's, which would end it if its client left."""
    monkeypatch.setattr(stream, "SILENCE_MAX_S", 0.05)
    monkeypatch.setattr(stream, "PAUSE_MAX_S", 0.05)
    asked = asyncio.Event()

    async def not_here(_: web.Request) -> web.StreamResponse:
        asked.set()
        return web.json_response({"error": {"message": "no worker holds it"}}, status=404)

    async def late(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"x-perdure-stream": STREAM})
        await response.prepare(request)
        await response.write(token(1))
        await asked.wait()
        await response.write(token(2) + b"data: [DONE]\n\n")
        return response

    absent = web.get(f"/v1/streams/{STREAM}", not_here)
    async with gateway(web.post("/v1/completions", late)) as first, gateway(absent) as other:
        assert await collect(first, other) == [1, 2]


async def test_the_only_gateway_is_not_left() -> None:
    only = events(token(1), b": cut off\n", token(2), b"data: [DONE]\n\n")
    async with gateway(web.post("/v1/completions", only)) as url:
        assert await collect(url) == [1, 2]


@pytest.mark.parametrize(("health", "served"), [(hang, "other"), (healthy, "patient")])
async def test_a_gateway_that_does_not_answer_is_asked_whether_it_lives(
    monkeypatch: pytest.MonkeyPatch, health: Handler, served: str
) -> None:
    monkeypatch.setattr(stream, "ASKED_AGAIN_S", 0.01)
    monkeypatch.setattr(stream, "SILENCE_MAX_S", 0.2)
    asked_often = asyncio.Event()
    looks = 0

    async def look(request: web.Request) -> web.StreamResponse:
        nonlocal looks
        looks += 1
        if looks >= 3:
            asked_often.set()
        return await health(request)

    async def late(request: web.Request) -> web.StreamResponse:
        await asked_often.wait()
        return await events(token(1), b"data: [DONE]\n\n")(request)

    answers = events(token(7), b"data: [DONE]\n\n")
    slow = (web.post("/v1/completions", late), web.get("/health", look))
    async with gateway(*slow) as first, gateway(web.post("/v1/completions", answers)) as other:
        assert await collect(first, other) == ([7] if served == "other" else [1])
