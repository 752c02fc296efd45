"""Templates as models bring them: what they expect to find, and what they must not reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controlplane.gateway.chat_template import PLAIN_TEMPLATE, ChatTemplate, TemplateFailed, find_template

HI = [{"role": "user", "content": "hi"}]


def render(source: str, **options: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(HI, **options)  # type: ignore[arg-type]


def test_special_tokens_and_the_generation_prompt_are_values():
    source = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    assert render(source) == "<s>hi>"
    assert render(source, add_generation_prompt=False) == "<s>hi"


def test_blocks_leave_no_blank_lines():
    assert render("{% for m in messages %}\n    {{ m.content }}\n{% endfor %}\n") == "    hi\n"


def test_generation_blocks_are_transparent():
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahib"


def test_a_templates_own_refusal_is_told():
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_an_undefined_attribute_is_a_refusal_not_a_crash():
    with pytest.raises(TemplateFailed):
        render("{{ messages[0].nothing.more }}")


def test_tojson_does_not_escape_for_html():
    assert render("{{ tools | tojson }}", tools=[{"name": "<é>"}]) == '[{"name": "<é>"}]'


def test_the_date_is_there():
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_loop_controls_are_there():
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(source: str):
    with pytest.raises(TemplateFailed):
        render(source)


def test_arguments_of_the_request_reach_the_template():
    assert render("{{ enable_thinking }}", extra={"enable_thinking": False}) == "False"


def test_a_final_message_can_be_continued():
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert render(source, continue_final_message=True) == "[hi"


def test_the_plain_default():
    assert render(PLAIN_TEMPLATE) == "user: hi\nassistant:"


def test_a_file_of_its_own_comes_before_the_config(tmp_path: Path):
    config = {"chat_template": "from config"}
    assert find_template(tmp_path, config) == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert find_template(tmp_path, config) == "from file"


def test_the_default_of_several_is_taken(tmp_path: Path):
    several = json.loads('[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]')
    assert find_template(tmp_path, {"chat_template": several}) == "d"
    assert find_template(tmp_path, {}) is None
