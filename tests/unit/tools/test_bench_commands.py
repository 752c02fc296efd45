"""What `perdure bench` says where it cannot measure: one line, no traceback."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tools.bench import start
from tools.bench.__main__ import app


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["engine", "--device", "cpu", "--model", "/nope"], "perdure bench engine: /nope is no model folder"),
        (["engine", "--device", "cuda"], "perdure bench engine: --device cuda: torch finds no GPU"),
        (["attention"], "perdure bench attention: needs a GPU, and torch finds none"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.setattr(start, "has_gpu", lambda: False)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.output.startswith(line)
    assert result.output.count("\n") == 1
