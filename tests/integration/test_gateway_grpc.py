"""Inference.Generate over a real channel: tokens, finishes, statuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from controlplane.gateway.params import choice_seeds
from controlplane.runtime.ids import draw_id
from controlplane.runtime.messages.route import RouteCode
from protos.perdure.v1 import inference_pb2, inference_pb2_grpc, serve_pb2
from tests.support.gateway import Stage, staged, until
from tests.support.serving_peer import MODEL, reference
from tests.support.tokenizers import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stage(folder: Path) -> AsyncIterator[Stage]:
    async with staged(folder) as made:
        yield made


@pytest.fixture
async def stub(stage: Stage) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    async with grpc.aio.insecure_channel(stage.grpc_address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def options(**given: object) -> inference_pb2.SamplingOptions:
    return inference_pb2.SamplingOptions(**given)  # type: ignore[arg-type]


async def test_tokens_of_every_choice_in_order(stage: Stage, stub: inference_pb2_grpc.InferenceStub):
    request = inference_pb2.GenerateRequest(
        prompt="The quick", n=2, sampling=options(max_tokens=30, seed=4, logprobs=2), request=draw_id()
    )
    events = [event async for event in stub.Generate(request)]
    assert {event.request for event in events} == {request.request}
    for choice, seed in enumerate(choice_seeds(4, 2)):
        own = [event for event in events if event.choice == choice]
        tokens: list[int] = []
        for event in own:
            assert event.first_index == len(tokens)
            tokens.extend(event.token_ids)
            assert [entry.index for entry in event.logprobs] == [
                event.first_index + place for place in range(len(event.token_ids))
            ]
        assert tokens == reference(stage.prompt("The quick"), seed, 30, stage.tokenizer.vocab_size)
        assert own[-1].finish_reason == serve_pb2.FINISH_REASON_LENGTH
        assert "".join(event.text for event in own) == stage.tokenizer.decode(tokens).rstrip("\ufffd")
    assert events[-1].usage.completion_tokens == 60
    assert not any(event.HasField("usage") for event in events[:-1])


async def test_prompts_may_be_ids(stage: Stage, stub: inference_pb2_grpc.InferenceStub):
    ids = stage.tokenizer.encode("The quick", add_special_tokens=True)
    request = inference_pb2.GenerateRequest(model=MODEL, prompt_ids=ids, sampling=options(max_tokens=5, seed=4))
    tokens = [token async for event in stub.Generate(request) for token in event.token_ids]
    assert tokens == reference(stage.prompt("The quick"), 4, 5, stage.tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"prompt": "a", "prompt_ids": [20]}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"prompt": "a", "request": "mine"}, grpc.StatusCode.INVALID_ARGUMENT, "request"),
        ({"prompt": "a", "sampling": options(temperature=9)}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"prompt": "a", "model": "other"}, grpc.StatusCode.NOT_FOUND, "model"),
    ],
)
async def test_refusals_name_the_field(
    stub: inference_pb2_grpc.InferenceStub, fields: dict[str, object], code: grpc.StatusCode, param: str
):
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        async for _ in stub.Generate(inference_pb2.GenerateRequest(**fields)):  # type: ignore[arg-type]
            pass
    assert refusal.value.code() is code
    status = rpc_status.from_call(refusal.value)  # type: ignore[arg-type]
    assert status is not None
    details = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(details)
    assert details.field_violations[0].field == param


async def test_a_full_queue_says_when_to_come_again(stage: Stage, stub: inference_pb2_grpc.InferenceStub):
    stage.leader.refuse_with = RouteCode.OVERLOADED
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        async for _ in stub.Generate(inference_pb2.GenerateRequest(prompt="a")):
            pass
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(refusal.value)  # type: ignore[arg-type]
    assert status is not None
    details = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(details)
    assert details.retry_delay.ToMilliseconds() == 50


async def test_a_cancelled_call_frees_its_sequence(folder: Path):
    async with staged(folder, step_s=0.02) as stage, grpc.aio.insecure_channel(stage.grpc_address) as channel:
        request = inference_pb2.GenerateRequest(prompt="a", sampling=options(max_tokens=400))
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
        await call.read()
        call.cancel()
        await until(lambda: not any(worker.sequences for worker in stage.workers), "the sequence freed")
