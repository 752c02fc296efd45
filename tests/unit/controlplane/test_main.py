"""What `perdure controlplane` makes of its file before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from controlplane import __main__ as command
from controlplane.process import ProcessOptions


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ProcessOptions]:
    """The options of every process that would have run."""
    found: list[ProcessOptions] = []

    async def run(options: ProcessOptions) -> None:
        found.append(options)

    monkeypatch.setattr(command, "run_process", run)
    monkeypatch.setattr(command, "configure_logging", lambda **_: None)
    return found


def controlplane(folder: Path, text: str, *arguments: str) -> Result:
    (folder / "cluster.yaml").write_text(text)
    app = typer.Typer()
    app.command()(command.controlplane_command)
    return CliRunner().invoke(app, ["--config", str(folder / "cluster.yaml"), "--etcd", "h:1", *arguments])


@pytest.mark.parametrize("path", ["gemma-3-270m", "/models/m.gguf", "no/such"])
def test_what_is_no_model_folder_is_refused_with_the_field(
    tmp_path: Path, started: list[ProcessOptions], path: str
) -> None:
    result = controlplane(tmp_path, f"model: {{path: {path}}}")
    assert result.exit_code == 1
    assert f"cluster.yaml: model.path: '{path}' is no model folder" in result.output
    assert not started


def test_a_relative_folder_becomes_a_path_that_all_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[ProcessOptions]
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert controlplane(tmp_path, "model: {path: tiny}").exit_code == 0
    record = started[0].deployment
    assert record is not None
    assert (record.spec.model_path, record.model) == (str(tmp_path / "tiny"), "tiny")


def test_other_hosts_paths_are_taken_as_they_are(tmp_path: Path, started: list[ProcessOptions]) -> None:
    assert controlplane(tmp_path, "model: {path: /only/there}").exit_code == 0
    record = started[0].deployment
    assert record is not None
    assert (record.spec.model_path, record.model) == ("/only/there", "there")


def test_a_gateway_alone_asks_for_no_deployment(tmp_path: Path, started: list[ProcessOptions]) -> None:
    assert controlplane(tmp_path, "model: {path: gemma-3-270m}", "--role", "gateway").exit_code == 0
    assert started[0].deployment is None
