"""Streams of the OpenAI API that go on by themselves when a gateway dies, is restarted, or cannot be reached any more.

    client = StreamClient(["http://a:8000", "http://b:8000"])
    async for chunk in client.stream("/v1/completions", {"prompt": "The sea", "max_tokens": 200}):
        print(chunk["choices"][0]["text"], end="")

Each event's id says where the stream is; after a break GET /v1/streams/{id} at any gateway goes on from there, so that
no text is lost or doubled. Needs aiohttp alone: the file may be copied.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

STREAM_HEADER = "x-perdure-stream"
PATIENCE_S = 30.0
"""How long workers keep a stream that no gateway asks for, at Perdure's default `failure_timeout`."""

PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 1.0
LINE_BYTES_MAX = 1024 * 1024
ANSWER_MAX_S = 20.0
"""A gateway answers within 15 s, if only to say that the stream will come."""

SILENCE_MAX_S = 3.0
"""A gateway writes at least a comment a second: one that is silent for so long is stopped, or cut off."""

ASKED_AGAIN_S = 1.0
"""How often a gateway that has not answered yet is asked whether it lives at all."""

CUT_OFF = b": cut off"
"""The comment of a gateway that reaches no worker: another one may."""


class Refused(Exception):
    """The request, or a part of the stream, was answered with an error that another try would not change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class StreamLost(Exception):
    """The stream broke and no gateway could go on with it in time."""


class _Broken(Exception):
    """This connection is of no more use; the stream may be."""


@dataclass(slots=True)
class _Progress:
    """What is known of a stream."""

    stream: str = ""
    last_event: str = ""
    done: bool = False
    # Another gateway's answer, which goes on with it.
    elsewhere: aiohttp.ClientResponse | None = None


class StreamClient:
    """Streams over several gateways, the first that answers first."""

    def __init__(
        self, urls: Sequence[str], *, patience_s: float = PATIENCE_S, headers: dict[str, str] | None = None
    ) -> None:
        """`urls`: base URLs of gateways, without /v1. `patience_s`: how long to look for one that can go on."""
        if not urls:
            raise ValueError("at least one gateway is needed")
        self._urls = [url.rstrip("/") for url in urls]
        self._patience_s = patience_s
        self._headers = headers or {}
        self._at = 0

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """POST `body` to `path` with `stream: true` and give its chunks, each exactly once, to the end.

        Raises Refused, or StreamLost.
        """
        progress = _Progress()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._patience_s / 3)
        async with aiohttp.ClientSession(
            timeout=timeout, headers=self._headers, read_bufsize=LINE_BYTES_MAX
        ) as session:
            deadline, pause = time.monotonic() + self._patience_s, PAUSE_MIN_S
            while not progress.done:
                try:
                    async for chunk in self._attempt(session, path, {**body, "stream": True}, progress):
                        deadline, pause = time.monotonic() + self._patience_s, PAUSE_MIN_S
                        yield chunk
                except (_Broken, aiohttp.ClientError, TimeoutError) as error:
                    if time.monotonic() > deadline:
                        raise StreamLost(f"stream {progress.stream or 'not begun'}: {error}") from error
                    self._at = (self._at + 1) % len(self._urls)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, PAUSE_MAX_S)

    async def _attempt(
        self, session: aiohttp.ClientSession, path: str, body: dict[str, Any], progress: _Progress
    ) -> AsyncIterator[dict[str, Any]]:
        """What one gateway gives: the stream from its beginning, or from where it broke."""
        url = self._urls[self._at]
        response, progress.elsewhere = progress.elsewhere, None
        if response is None:
            asked = self._resume(session, progress) if progress.stream else session.post(f"{url}{path}", json=body)
            response = await self._answer(session, url, asked)
        async with response:
            if response.status != 200:
                await _refuse(response)
            progress.stream = response.headers.get(STREAM_HEADER, progress.stream)
            async for chunk in self._chunks(session, response, progress):
                yield chunk
        if not progress.done and progress.elsewhere is None:
            raise _Broken(f"{url} ended the stream early")

    def _resume(self, session: aiohttp.ClientSession, progress: _Progress) -> Awaitable[aiohttp.ClientResponse]:
        headers = {"Last-Event-ID": progress.last_event} if progress.last_event else {}
        return session.get(f"{self._urls[self._at]}/v1/streams/{progress.stream}", headers=headers)

    async def _answer(
        self, session: aiohttp.ClientSession, url: str, asked: Awaitable[aiohttp.ClientResponse]
    ) -> aiohttp.ClientResponse:
        """The answer's head. A stopped gateway takes a request and never answers: one that does not even say that it
        lives is left, if there is another."""
        answer = asyncio.ensure_future(asked)
        try:
            async with asyncio.timeout(ANSWER_MAX_S):
                while not (await asyncio.wait({answer}, timeout=ASKED_AGAIN_S))[0]:
                    if len(self._urls) > 1:
                        async with asyncio.timeout(SILENCE_MAX_S), session.get(f"{url}/health"):
                            pass
            return answer.result()
        finally:
            answer.cancel()

    async def _chunks(
        self, session: aiohttp.ClientSession, response: aiohttp.ClientResponse, progress: _Progress
    ) -> AsyncIterator[dict[str, Any]]:
        """The response's events; `progress` moves with each that is complete."""
        event = ""
        while True:
            line = await self._line(session, response, progress)
            if not line.endswith(b"\n"):
                # The connection broke within it, or another goes on.
                return
            if line.startswith(CUT_OFF) and await self._goes_on_elsewhere(session, progress):
                return
            if line.startswith(b"id:"):
                event = line[3:].strip().decode()
            elif line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    progress.done = True
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    progress.done = True
                    raise Refused(500, chunk["error"].get("message", "the stream failed"))
                progress.last_event = event or progress.last_event
                yield chunk

    async def _line(
        self, session: aiohttp.ClientSession, response: aiohttp.ClientResponse, progress: _Progress
    ) -> bytes:
        """The next line; empty if the response is over, or another gateway has the stream.

        A silent gateway is not left before that: it may live and be late, or we were stopped ourselves, and a gateway
        that lives ends the stream of a client who leaves.
        """
        reading = asyncio.ensure_future(response.content.readline())
        deadline, wait_s = time.monotonic() + self._patience_s, SILENCE_MAX_S
        try:
            while not (await asyncio.wait({reading}, timeout=wait_s))[0]:
                if await self._goes_on_elsewhere(session, progress):
                    return b""
                if time.monotonic() > deadline:
                    raise _Broken(f"{self._urls[self._at]} is silent")
                wait_s = PAUSE_MAX_S
            return reading.result()
        finally:
            reading.cancel()

    async def _goes_on_elsewhere(self, session: aiohttp.ClientSession, progress: _Progress) -> bool:
        """Whether the next gateway has the stream. If not, the present one is not left: it may hold the only copy."""
        at = self._at
        self._at = (at + 1) % len(self._urls)
        if self._at != at and progress.stream:
            try:
                async with asyncio.timeout(SILENCE_MAX_S):
                    response = await self._resume(session, progress)
            except (aiohttp.ClientError, TimeoutError):
                pass
            else:
                if response.status == 200:
                    progress.elsewhere = response
                    return True
                response.close()
        self._at = at
        return False


async def _refuse(response: aiohttp.ClientResponse) -> None:
    """Raises _Broken for what a later try, or another gateway, may answer, and Refused for all else."""
    text = await response.text()
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text
    again = response.status in (429, 502, 503, 504) and response.headers.get("x-should-retry") != "false"
    if again:
        raise _Broken(f"{response.status}: {message}")
    raise Refused(response.status, message)
