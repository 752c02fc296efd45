"""What `perdure ctl apply` makes of a file before it tells the cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from protos.perdure.v1 import admin_pb2
from tools.ctl import app as ctl


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[admin_pb2.ApplyRequest]:
    """Every deployment that a cluster was asked for."""
    found: list[admin_pb2.ApplyRequest] = []

    class Stub:
        def __enter__(self) -> Stub:
            return self

        def __exit__(self, *_: object) -> None: ...

        def Apply(self, request: admin_pb2.ApplyRequest, timeout: float) -> admin_pb2.ApplyResponse:
            found.append(request)
            return admin_pb2.ApplyResponse(created=True)

    monkeypatch.setattr(ctl, "admin", lambda _: Stub())
    return found


def apply(folder: Path, text: str) -> Result:
    (folder / "wanted.yaml").write_text(text)
    return CliRunner().invoke(ctl.app, ["apply", "-f", str(folder / "wanted.yaml"), "--address", "h:1", "--json"])


def model(folder: Path, name: str = "tiny") -> Path:
    (folder / name).mkdir()
    (folder / name / "config.json").write_text("{}")
    return folder / name


def test_a_relative_folder_becomes_a_path_that_daemons_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[admin_pb2.ApplyRequest]
) -> None:
    folder = model(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert apply(tmp_path, "model: {path: tiny}").exit_code == 0
    (request,) = asked
    assert (request.deployment.spec.model_path, request.deployment.model) == (str(folder), "tiny")


def test_other_hosts_paths_are_taken_as_they_are(tmp_path: Path, asked: list[admin_pb2.ApplyRequest]) -> None:
    assert apply(tmp_path, "model: {path: /only/there}").exit_code == 0
    assert asked[0].deployment.spec.model_path == "/only/there"


def test_a_name_becomes_the_folder_that_stands_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[admin_pb2.ApplyRequest]
) -> None:
    folder = model(tmp_path, "prepared")

    async def prepare(name: str, _: object) -> Path:
        assert name == "gemma-3-270m"
        return folder

    monkeypatch.setattr(ctl, "prepare_model", prepare)
    assert apply(tmp_path, "parallelism: {data_parallel_size: 2}").exit_code == 0
    (request,) = asked
    assert (request.deployment.spec.model_path, request.deployment.model) == (str(folder), "gemma-3-270m")


def test_nothing_is_applied_where_one_model_is_missing(tmp_path: Path, asked: list[admin_pb2.ApplyRequest]) -> None:
    result = apply(tmp_path, f"model: {{path: {model(tmp_path)}}}\n---\nmodel: {{path: no-such, deployment: n}}")
    assert result.exit_code == 1
    assert "no-such is no model folder" in result.output
    assert not asked


def test_an_empty_file_changes_nothing(tmp_path: Path, asked: list[admin_pb2.ApplyRequest]) -> None:
    result = apply(tmp_path, "")
    assert result.exit_code == 1
    assert "describes no deployment" in result.output
    assert not asked
