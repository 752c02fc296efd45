"""Every bad request has its own 4xx, its parameter and its words; every overload its delay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from structlog.testing import capture_logs

from controlplane.gateway.limits import GatewayLimits
from controlplane.runtime.messages.route import RouteCode
from tests.support.gateway import Stage, staged
from tests.support.serving_peer import MODEL
from tests.support.tokenizers import CONTEXT_TOKENS, write_model

HELLO = "The quick brown"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": MODEL, "prompt": HELLO}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stage(folder: Path) -> AsyncIterator[Stage]:
    async with staged(folder) as made:
        yield made


class TestRefusals:
    @pytest.mark.parametrize(
        ("path", "body", "status", "param", "words"),
        [
            ("completions", {**PROMPT, "temperature": 3}, 400, "temperature", "less than or equal to 2"),
            ("completions", {**PROMPT, "top_p": 0}, 400, "top_p", "greater than 0"),
            ("completions", {**PROMPT, "n": 0}, 400, "n", "greater than or equal to 1"),
            ("completions", {**PROMPT, "n": 1000}, 400, "n", "at most 128"),
            ("completions", {**PROMPT, "best_of": 3}, 400, "best_of", "must equal n"),
            ("completions", {**PROMPT, "suffix": "x"}, 400, "suffix", "not supported"),
            ("completions", {**PROMPT, "max_tokens": 0}, 400, "max_tokens", "at least 1"),
            ("completions", {**PROMPT, "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
            ("completions", {**PROMPT, "max_tokens": "many"}, 400, "max_tokens", "valid integer"),
            ("completions", {**PROMPT, "max_tokens": 10_000}, 400, "max_tokens", "maximum context length is 512"),
            ("completions", {**PROMPT, "logprobs": 50}, 400, "logprobs", "at most 20"),
            ("completions", {**PROMPT, "logit_bias": {"99999": 1}}, 400, "logit_bias", "not in the vocabulary"),
            ("completions", {**PROMPT, "logit_bias": {"9": 101}}, 400, "logit_bias", "less than or equal to 100"),
            ("completions", {**PROMPT, "stop": ["x"] * 17}, 400, "stop", "at most 16"),
            ("completions", {**PROMPT, "stop": [1]}, 400, "stop", "string"),
            ("completions", {**PROMPT, "min_tokens": 30}, 400, "min_tokens", "must not exceed max_tokens"),
            ("completions", {**PROMPT, "stream_options": {}}, 400, "stream_options", "when stream is true"),
            ("completions", {**PROMPT, "prompt": []}, 400, "prompt", "must not be empty"),
            ("completions", {**PROMPT, "prompt": [7, 99999]}, 400, "prompt", "prompt[1]: token id 99999 is not in the"),
            (
                "completions",
                {**PROMPT, "prompt": [-1]},
                400,
                "prompt",
                "prompt[0]: token id -1 is not in the vocabulary",
            ),
            ("completions", {**PROMPT, "prompt": [[7], [7, -1]]}, 400, "prompt", "prompt[1][1]: token id -1 is not"),
            ("completions", {**PROMPT, "prompt": {"a": 1}}, 400, "prompt", ""),
            ("completions", {**PROMPT, "prompt": "fox " * 600}, 400, "prompt", "maximum context length is 512"),
            ("completions", {"model": MODEL}, 400, "prompt", "Field required"),
            ("completions", {**PROMPT, "model": "other"}, 404, "model", "does not exist"),
            ("completions", {**PROMPT, "response_format": {"type": "json_object"}}, 400, "response_format", "not supp"),
            ("completions", {**PROMPT, "guided_regex": "[0-9]+"}, 400, "guided_regex", "not supp"),
            ("completions", {**PROMPT, "guided_grammar": "root ::= x"}, 400, "guided_grammar", "not supp"),
            ("chat/completions", {**CHAT, "guided_json": {}}, 400, "guided_json", "not supp"),
            ("chat/completions", {**CHAT, "guided_choice": ["a", "b"]}, 400, "guided_choice", "not supp"),
            ("chat/completions", {**CHAT, "structured_outputs": {"regex": "a"}}, 400, "structured_outputs", "not supp"),
            ("chat/completions", {**CHAT, "messages": []}, 400, "messages", "at least 1"),
            ("chat/completions", {**CHAT, "messages": "hi"}, 400, "messages", "valid list"),
            ("chat/completions", {**CHAT, "messages": [{"role": "user"}]}, 400, "messages", "content is required"),
            ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
            ("chat/completions", {**CHAT, "max_tokens": 0}, 400, "max_tokens", "at least 1"),
            ("chat/completions", {**CHAT, "max_completion_tokens": 600}, 400, "max_completion_tokens", "too large"),
            ("chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice", "are supported"),
            (
                "chat/completions",
                {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
                400,
                "messages",
                "text",
            ),
        ],
    )
    async def test_each_bad_request_names_its_parameter(
        self, stage: Stage, path: str, body: object, status: int, param: str, words: str
    ):
        got, headers, answer = await stage.post(f"/v1/{path}", body)
        error: Any = answer["error"]
        assert (got, error["param"]) == (status, param), error
        assert words in error["message"]
        assert error["type"] == "invalid_request_error"
        assert headers["x-request-id"]
        assert stage.leader.asked == []

    async def test_an_overlong_prompt_has_the_code_that_clients_look_for(self, stage: Stage):
        with pytest.raises(openai.BadRequestError) as refusal:
            await stage.openai().completions.create(model=MODEL, prompt=[20] * CONTEXT_TOKENS)
        assert refusal.value.code == "context_length_exceeded"

    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [
            ("completions", {**PROMPT, "prompt": "fox " * 50_000}, "prompt"),
            ("completions", {**PROMPT, "prompt": ["fox", "fox " * 50_000]}, "prompt"),
            ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "fox " * 50_000}]}, "messages"),
        ],
    )
    async def test_a_prompt_far_too_long_is_refused_alike(
        self, stage: Stage, path: str, body: dict[str, Any], param: str
    ):
        status, _, answer = await stage.post(f"/v1/{path}", body)
        error: Any = answer["error"]
        assert (status, error["param"], error["code"]) == (400, param, "context_length_exceeded")
        text = f"this model's maximum context length is 512 tokens, but the {param} has at least "
        assert error["message"].startswith(text)
        assert error["message"].endswith("; please reduce its length")

    @pytest.mark.parametrize(
        ("data", "content_type", "status", "words"),
        [
            (b"{", "application/json", 400, "not valid JSON"),
            (b"[1]", "application/json", 400, "must be a JSON object"),
            (b'{"prompt": "\xff"}', "application/json", 400, "not valid JSON"),
            (b"[" * 100_000, "application/json", 400, "not valid JSON"),
            (b"prompt=x", "application/x-www-form-urlencoded", 415, "must be application/json"),
            (b'{"prompt": "' + b"x" * 5000 + b'"}', "application/json", 413, "too large"),
        ],
    )
    async def test_bodies_that_are_none(self, folder: Path, data: bytes, content_type: str, status: int, words: str):
        async with staged(folder, limits=GatewayLimits(body_bytes_max=4096 if status == 413 else 2**20)) as stage:
            url = f"{stage.gateway.url}/v1/completions"
            async with stage.http.post(url, data=data, headers={"Content-Type": content_type}) as answer:
                assert answer.status == status
                assert words in (await answer.json())["error"]["message"]

    async def test_a_body_that_is_not_encoded_as_it_says(self, stage: Stage):
        """aiohttp fails only when it is read, and would answer 500."""
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        async with stage.http.post(f"{stage.gateway.url}/v1/completions", data=b"{}", headers=headers) as answer:
            assert answer.status == 400
            assert "Content-Encoding" in (await answer.json())["error"]["message"]

    async def test_unknown_paths_and_methods(self, stage: Stage):
        async with stage.http.get(f"{stage.gateway.url}/v1/nothing") as answer:
            assert answer.status == 404
            assert (await answer.json())["error"]["code"] == "unknown_url"
        async with stage.http.get(f"{stage.gateway.url}/v1/completions") as answer:
            assert answer.status == 405
            assert "only POST" in (await answer.json())["error"]["message"]

    async def test_unknown_fields_are_let_through(self, stage: Stage):
        body = {**PROMPT, "max_tokens": 1, "something_new": 1, "stream": True}
        with capture_logs() as logged:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            async with stage.http.post(f"{stage.gateway.url}/v1/completions", json=body) as answer:
                assert answer.status == 200
        (ignored,) = (line["fields"] for line in logged if line["event"] == "request_fields_ignored")
        assert ignored == ["something_new", "stream_options.continuous_usage_stats"]

    async def test_what_is_no_http_is_one_line_in_the_log(
        self, stage: Stage, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ):
        port = int(stage.gateway.url.rsplit(":", 1)[1])
        with capture_logs() as logged:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nno header\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.0 400")
            writer.close()
        (line,) = logged
        assert (line["event"], line["log_level"], line["client"]) == ("request_malformed", "info", "127.0.0.1")
        assert "no header" in line["reason"]
        assert "\n" not in line["reason"]
        assert not caplog.records
        assert "Traceback" not in capsys.readouterr().err

    async def test_a_full_queue_says_when_to_come_again(self, stage: Stage):
        stage.leader.refuse_with = RouteCode.OVERLOADED
        status, headers, answer = await stage.post("/v1/completions", PROMPT)
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert answer["error"]["code"] == "overloaded"  # type: ignore[index]

    async def test_when_nothing_can_serve_it_is_said(self, stage: Stage):
        stage.leader.refuse_with = RouteCode.NO_REPLICA
        status, headers, _ = await stage.post("/v1/completions", {**PROMPT, "stream": True})
        assert status == 503
        assert "retry-after" in headers

    async def test_a_model_the_leader_no_longer_knows_is_forgotten(self, stage: Stage):
        stage.leader.refuse_with = RouteCode.UNKNOWN_DEPLOYMENT
        status, _, _ = await stage.post("/v1/completions", PROMPT)
        assert status == 404
        assert (await stage.openai().models.list()).data == []
