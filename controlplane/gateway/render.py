"""Answers as JSON, streamed and whole, in both of the OpenAI API's shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from controlplane.gateway.text_stream import Piece, TokenInfo
from controlplane.gateway.tokenizer import ModelTokenizer

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": waiting\n"
CUT_OFF = b": cut off\n"
"""Instead of it while this gateway reaches no worker: another one may, and go on with the stream."""
"""A comment. No empty line follows: once it has met an id, the official client takes one for an event without data."""

encode_json = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt shown before its answers."""

    text: str
    infos: tuple[TokenInfo, ...] = ()


@dataclass(slots=True)
class Answer:
    """A whole choice, gathered from its pieces."""

    text: list[str]
    infos: list[TokenInfo]
    finish: str | None = None
    stop_reason: str | int | None = None


def gather(pieces: Iterable[Piece], answers: dict[int, Answer]) -> None:
    """Add pieces to the answers that they belong to."""
    for piece in pieces:
        answer = answers.setdefault(piece.choice, Answer([], []))
        answer.text.append(piece.text)
        answer.infos.extend(piece.infos)
        if piece.finish is not None:
            answer.finish, answer.stop_reason = piece.finish, piece.stop_reason


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(body) + b"\n\n"


class Shape(Protocol):
    """One of the two APIs' ways to write an answer."""

    def opening(self, choice: int, echo: Echo | None) -> bytes:
        """What stands before a choice's first piece, maybe nothing."""
        ...

    def piece(self, piece: Piece) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...

    def whole(self, answers: dict[int, Answer], echoes: Sequence[Echo | None], n: int, usage: Usage) -> bytes: ...


class _Chunks:
    """What both shapes' streams share: most chunks differ from the one before in nothing but their text."""

    def __init__(self, head: dict[str, Any], *, with_usage: bool) -> None:
        self._head = head
        # With include_usage every chunk but the last carries a null usage.
        self._tail: dict[str, Any] = {"usage": None} if with_usage else {}
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, choice: dict[str, Any]) -> bytes:
        return event({**self._head, "choices": [choice], **self._tail})

    def plain(self, choice: int, text: str, make: Any) -> bytes:
        frame = self._frames.get(choice)
        if frame is None:
            before, _, after = self.chunk(make(choice)).partition(b'"\\u0000"')
            frame = self._frames[choice] = (before, after)
        return frame[0] + encode_json(text) + frame[1]

    def usage(self, usage: Usage) -> bytes:
        return event({**self._head, "choices": [], "usage": usage.body()})


_MARK = "\0"
"""Stands for the text in a chunk that is made once and filled often."""


class ChatShape:
    """chat.completion and chat.completion.chunk."""

    def __init__(
        self, id_: str, created: int, model: str, tokenizer: ModelTokenizer, *, logprobs: bool, with_usage: bool
    ) -> None:
        head = {"id": id_, "object": "chat.completion.chunk", "created": created, "model": model}
        self._chunks = _Chunks(head, with_usage=with_usage)
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self, choice: int, echo: Echo | None) -> bytes:
        del echo
        delta = {"role": "assistant", "content": ""}
        return self._chunks.chunk({"index": choice, "delta": delta, "logprobs": None, "finish_reason": None})

    def piece(self, piece: Piece) -> bytes:
        if piece.finish is None and not piece.infos:
            return self._chunks.plain(piece.choice, piece.text, _chat_plain) if piece.text else b""
        delta = {"content": piece.text} if piece.text else {}
        choice = {"index": piece.choice, "delta": delta, "logprobs": self._details(piece.infos)}
        choice["finish_reason"] = piece.finish
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        return self._chunks.chunk(choice)

    def usage(self, usage: Usage) -> bytes:
        return self._chunks.usage(usage)

    def whole(self, answers: dict[int, Answer], echoes: Sequence[Echo | None], n: int, usage: Usage) -> bytes:
        del echoes, n
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(answer.text), "refusal": None},
                "logprobs": self._details(answer.infos),
                "finish_reason": answer.finish,
                "stop_reason": answer.stop_reason,
            }
            for index, answer in sorted(answers.items())
        ]
        head = {**self._head, "object": "chat.completion"}
        return encode_json({**head, "choices": choices, "usage": usage.body()})

    def _details(self, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [self._token(info) for info in infos], "refusal": None}

    def _token(self, info: TokenInfo) -> dict[str, Any]:
        top = [self._alternative(token, logprob) for token, logprob in info.top]
        return {**self._alternative(info.token, info.logprob), "top_logprobs": top}

    def _alternative(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": shown(raw), "logprob": logprob, "bytes": list(raw)}


class CompletionShape:
    """text_completion."""

    def __init__(
        self, id_: str, created: int, model: str, tokenizer: ModelTokenizer, *, logprobs: bool, with_usage: bool
    ) -> None:
        self._head = {"id": id_, "object": "text_completion", "created": created, "model": model}
        self._chunks = _Chunks(self._head, with_usage=with_usage)
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self, choice: int, echo: Echo | None) -> bytes:
        if echo is None:
            return b""
        logprobs = self._details(echo.infos)
        return self._chunks.chunk({"index": choice, "text": echo.text, "logprobs": logprobs, "finish_reason": None})

    def piece(self, piece: Piece) -> bytes:
        if piece.finish is None and not piece.infos:
            return self._chunks.plain(piece.choice, piece.text, _completion_plain) if piece.text else b""
        choice = {"index": piece.choice, "text": piece.text, "logprobs": self._details(piece.infos)}
        choice["finish_reason"] = piece.finish
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        return self._chunks.chunk(choice)

    def usage(self, usage: Usage) -> bytes:
        return self._chunks.usage(usage)

    def whole(self, answers: dict[int, Answer], echoes: Sequence[Echo | None], n: int, usage: Usage) -> bytes:
        choices: list[dict[str, Any]] = []
        for index, answer in sorted(answers.items()):
            echo = echoes[index // n]
            infos = [*(echo.infos if echo else ()), *answer.infos]
            choices.append(
                {
                    "index": index,
                    "text": (echo.text if echo else "") + "".join(answer.text),
                    "logprobs": self._details(infos),
                    "finish_reason": answer.finish,
                    "stop_reason": answer.stop_reason,
                }
            )
        return encode_json({**self._head, "choices": choices, "usage": usage.body()})

    def _details(self, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "text_offset": [info.offset for info in infos],
            "token_logprobs": [info.logprob for info in infos],
            "tokens": [self._name(info.token) for info in infos],
            "top_logprobs": [self._top(info) for info in infos],
        }

    def _top(self, info: TokenInfo) -> dict[str, float] | None:
        """The best alternatives and the token itself, which need not be one of them."""
        if info.logprob is None:
            return None
        return {self._name(token): logprob for token, logprob in info.top} | {self._name(info.token): info.logprob}

    def _name(self, token: int) -> str:
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # Half a character, as this API writes it; keys stay distinct.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def shown(raw: bytes) -> str:
    """A token's text; half a character as a replacement character, for `bytes` stands beside it."""
    return raw.decode(errors="replace")


def _chat_plain(choice: int) -> dict[str, Any]:
    return {"index": choice, "delta": {"content": _MARK}, "logprobs": None, "finish_reason": None}


def _completion_plain(choice: int) -> dict[str, Any]:
    return {"index": choice, "text": _MARK, "logprobs": None, "finish_reason": None}
