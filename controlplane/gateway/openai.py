"""The OpenAI API's requests, with the extensions that inference servers share. Unknown fields are logged, not used."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_TOKENS_COMPLETION = 16
"""The completions API's default."""

Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool = False


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str


class GenerationRequest(BaseModel):
    """What both APIs share."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=False)

    model: str | None = None
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=2**32 - 1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    logit_bias: dict[TokenId, Bias] | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    priority: int = Field(default=0, ge=-(2**31), le=2**31 - 1)
    user: str | None = None
    response_format: ResponseFormat | None = None
    # vLLM's ways to constrain an answer.
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None

    @field_validator(
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "stream",
        "ignore_eos",
        "min_tokens",
        "include_stop_str_in_output",
        "priority",
        mode="before",
    )
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("response_format")
    @classmethod
    def _text_only(cls, value: ResponseFormat | None) -> ResponseFormat | None:
        if value is not None and value.type != "text":
            raise ValueError(f"{value.type!r} is not supported, only 'text' is")
        return value

    @field_validator("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
    @classmethod
    def _unconstrained(cls, value: Any) -> Any:
        # Not with the fields that are passed over: an answer without its constraint is no answer.
        if value is not None:
            raise ValueError("is not supported: answers are not constrained")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings; an empty one would stop everything and is no stop."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in found if stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    # Ids are checked against the model's vocabulary (params.check_ids).
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=MAX_TOKENS_COMPLETION, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0)
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    @field_validator("echo", mode="before")
    @classmethod
    def _null_is_false(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("filling in before a suffix is not supported")
        return value

    def prompts(self) -> list[str | list[int]]:
        """Every prompt of the request, as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message; what a template may look at beside role and content is kept."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    @model_validator(mode="after")
    def _content_is_there(self) -> ChatMessage:
        # Only an assistant may have said nothing but a tool call.
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is required in a message of role {self.role!r}")
        return self

    def for_template(self) -> dict[str, Any]:
        plain = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            plain["content"] = "\n".join(part.text for part in self.content)
        plain.setdefault("content", "")
        return plain


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("tool_choice")
    @classmethod
    def _no_forced_tool(cls, value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if value is not None and value not in ("none", "auto"):
            raise ValueError("only 'none' and 'auto' are supported: tool calls are returned as text")
        return value
