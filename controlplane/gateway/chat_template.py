"""Chat templates as Hugging Face models carry them: jinja2, sandboxed, with the globals that templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For a model that comes without a template: roles as words, one message a line."""


class TemplateFailed(ValueError):
    """The template refused the conversation, or does not compile; the text says why."""


class ChatTemplate:
    """One compiled template. `named` is False for the plain default."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateFailed(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation. Raises TemplateFailed."""
        values: dict[str, Any] = {**self._special_tokens, **(extra or {})}
        values |= {"messages": messages, "tools": tools, "documents": None}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            text = self._template.render(values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise TemplateFailed(str(error) or type(error).__name__) from error
        return _cut_after(text, messages) if continue_final_message else text


def find_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The source in chat_template.jinja, else in tokenizer_config.json (its "default" if there are several)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = {item["name"]: item["template"] for item in found}
        return named.get("default")
    return found


def _cut_after(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Drop what follows the last message's content, so that the model goes on with it."""
    final = str(messages[-1]["content"]).strip()
    at = text.rfind(final)
    if at < 0:
        raise TemplateFailed("the template changed the final message, so it cannot be continued")
    return text[: at + len(final)]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    # Local time without a zone is what transformers gives templates.
    return datetime.now().strftime(form)  # noqa: DTZ005
