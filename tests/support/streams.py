"""Many client streams at once, each token timed, so that a test can say what a fault cost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import grpc.aio

from protos.perdure.v1 import inference_pb2, inference_pb2_grpc

UNFINISHED = "\ufffd"


@dataclass
class Stream:
    """What one client saw: token ids in order of arrival, text, the times of each event, and how it ended."""

    prompt: str
    tokens: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    finish: str = ""
    error: str = ""

    @property
    def longest_gap_s(self) -> float:
        """Longest silence between two events of the stream."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


async def grpc_stream(address: str, stream: Stream, tokens: int, *, temperature: float = 0.0, seed: int = 1) -> None:
    """Run one Inference.Generate into `stream`. Errors end in `stream.error`."""
    options = inference_pb2.SamplingOptions(
        temperature=temperature, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, seed=seed
    )
    request = inference_pb2.GenerateRequest(prompt=stream.prompt, sampling=options, n=1)
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            async for event in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=600):
                stream.times.append(time.monotonic())
                stream.indexes.extend(range(event.first_index, event.first_index + len(event.token_ids)))
                stream.tokens.extend(event.token_ids)
                stream.text += event.text
                if event.finish_reason:
                    stream.finish = str(event.finish_reason)
        except grpc.aio.AioRpcError as error:
            stream.error = f"{error.code().name}: {error.details()}"


async def http_stream(url: str, stream: Stream, tokens: int, *, temperature: float = 0.0, seed: int = 1) -> None:
    """Run one streaming /v1/completions into `stream`. Errors end in `stream.error`."""
    body = {
        "model": "tiny",
        "prompt": stream.prompt,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "temperature": temperature,
        "seed": seed,
        "stream": True,
    }
    timeout = aiohttp.ClientTimeout(total=600)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{url}/v1/completions", json=body) as reply,
        ):
            if reply.status != 200:
                stream.error = f"{reply.status}: {await reply.text()}"
                return
            async for line in reply.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    stream.error = event["error"]["message"]
                    return
                stream.times.append(time.monotonic())
                for choice in event["choices"]:
                    stream.text += choice["text"]
                    stream.finish = choice["finish_reason"] or stream.finish
    except (aiohttp.ClientError, TimeoutError) as error:
        stream.error = f"{type(error).__name__}: {error}"


@dataclass
class Wave:
    """A set of streams under way."""

    streams: list[Stream]
    tasks: list[asyncio.Task[None]]

    async def reach(self, events: int, timeout: float = 60.0) -> None:
        """Wait until every stream has had `events` events or has ended."""
        deadline = time.monotonic() + timeout
        while any(
            len(stream.times) < events and not task.done()
            for stream, task in zip(self.streams, self.tasks, strict=True)
        ):
            assert time.monotonic() < deadline, f"streams stand at {[len(stream.times) for stream in self.streams]}"
            await asyncio.sleep(0.01)

    async def finish(self) -> list[Stream]:
        """Wait for all streams to end."""
        await asyncio.gather(*self.tasks)
        return self.streams


def start_wave(address: str, url: str, count: int, tokens: int, **sampling: float) -> Wave:
    """`count` streams of `tokens` tokens, half over gRPC (token ids), half over HTTP (text)."""
    streams = [
        Stream(prompt=f"Stream {index} tells of the sea, the wind and number {index * 7919}.") for index in range(count)
    ]
    tasks = [
        asyncio.create_task(grpc_stream(address, stream, tokens, **sampling))  # type: ignore[arg-type]
        if index % 2 == 0
        else asyncio.create_task(http_stream(url, stream, tokens, **sampling))  # type: ignore[arg-type]
        for index, stream in enumerate(streams)
    ]
    return Wave(streams, tasks)


def assert_identical(seen: list[Stream], undisturbed: list[Stream], tokens: int) -> None:
    """Every stream ended well, with exactly the tokens and the text of the undisturbed run: none lost, none doubled."""
    for index, (stream, reference) in enumerate(zip(seen, undisturbed, strict=True)):
        assert not stream.error, f"stream {index}: {stream.error} after {len(stream.times)} events"
        assert stream.finish, f"stream {index} ended without a finish"
        if stream.tokens:
            assert stream.indexes == list(range(tokens)), f"stream {index}: indexes {stream.indexes}"
            assert stream.tokens == reference.tokens, (
                f"stream {index}: tokens differ from {first_difference(stream.tokens, reference.tokens)} on"
            )
        assert stream.text == reference.text, (
            f"stream {index}: text differs from character {first_difference(stream.text, reference.text)} on"
        )


def assert_beginnings(seen: list[Stream], undisturbed: list[Stream], tokens: int) -> None:
    """Every stream ended well after `tokens` tokens, which are the first ones of the undisturbed run."""
    for index, (stream, reference) in enumerate(zip(seen, undisturbed, strict=False)):
        assert not stream.error, f"stream {index}: {stream.error} after {len(stream.times)} events"
        assert stream.finish, f"stream {index} ended without a finish"
        if stream.tokens:
            assert stream.tokens == reference.tokens[:tokens], f"stream {index}: other tokens"
        # Bytes of an unfinished character show as one, at the end alone.
        assert reference.text.startswith(stream.text.rstrip(UNFINISHED)), f"stream {index}: other text"


def first_difference(seen: Sequence[object], reference: Sequence[object]) -> int:
    """Index of the first item that differs; the shorter length if none does."""
    differing = (index for index, (a, b) in enumerate(zip(seen, reference, strict=False)) if a != b)
    return next(differing, min(len(seen), len(reference)))
