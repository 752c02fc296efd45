"""What README and deploy/ say is true of the code: command lines parse, files load, every key is described."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from controlplane.config import ClusterConfig, ControlPlaneConfig, EtcdConfig, NodeConfig
from tools.cli import COMMANDS, build_app, wanted_command

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"


def readme_commands() -> Iterator[str]:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    for line in re.findall(r"^\$ perdure (.+)$", text, re.MULTILINE):
        yield line.split("  #")[0]


def shell_commands(path: Path) -> Iterator[str]:
    text = path.read_text().replace("\\\n", " ")
    yield from re.findall(r'(?:bin/perdure"?) ((?:serve|controlplane|worker) .+)$', text, re.MULTILINE)


def container_commands(value: Any) -> Iterator[str]:
    """Every list under `command` or `args` that begins with one of our commands."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key in ("command", "args") and isinstance(part, list) and part[0] in COMMANDS:
                yield shlex.join(part)
            else:
                yield from container_commands(part)
    elif isinstance(value, list):
        for part in value:
            yield from container_commands(part)


def all_commands() -> list[str]:
    commands = list(readme_commands())
    for path in (DEPLOY / "slurm.sbatch", *sorted((DEPLOY / "systemd").iterdir())):
        commands += shell_commands(path)
    for path in (DEPLOY / "docker-compose.yaml", *sorted((DEPLOY / "kubernetes").iterdir())):
        for document in yaml.safe_load_all(path.read_text()):
            commands += container_commands(document)
    return commands


def parse(arguments: list[str]) -> None:
    """Parse a command line down to its last sub-command, without running it."""
    command: Any = typer.main.get_command(build_app(wanted_command(arguments)))
    context = command.make_context("perdure", arguments)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def test_the_documents_hold_the_commands_they_should() -> None:
    called = {line.split()[0] for line in all_commands()}
    assert called == {"up", "serve", "controlplane", "worker", "ctl"}
    assert len(all_commands()) >= 20


@pytest.mark.parametrize("line", all_commands())
def test_command_line_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parse(shlex.split(line))


def test_a_flag_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["worker", "--no-such-flag", "x"])


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-local.yaml", "cluster-containers.yaml"])
def test_example_configuration_loads(name: str) -> None:
    assert ClusterConfig.load(DEPLOY / name).replicas >= 2


def test_example_of_several_deployments_loads() -> None:
    first, second = (config.deployment() for config in ClusterConfig.load_all(DEPLOY / "two-models.yaml"))
    assert (first.recovery_strategy, first.spares, second.spares) == ("elastic_scaling", 2, 0)


def test_configuration_inside_the_kubernetes_manifest_loads(tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "controlplane.yaml").read_text()))
    (text,) = [document["data"]["cluster.yaml"] for document in documents if document["kind"] == "ConfigMap"]
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert ClusterConfig.load(path).cluster.name == "kubernetes"


def test_readme_describes_every_key_and_no_other() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    described = {row.replace("….", "cluster.nodes[].") for row in rows}
    assert described == set(keys(ClusterConfig)) | {"cluster.nodes[]"}


def test_readme_names_the_keys_of_the_short_rows() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    for start, section in (("| `cluster.controlplanes[]`", ControlPlaneConfig), ("| `cluster.etcd`", EtcdConfig)):
        (row,) = [line for line in lines if line.startswith(start)]
        assert set(section.model_fields) <= set(re.findall(r"`([a-z_]+)`", row))


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if name == "nodes":
            yield from (f"cluster.nodes[].{key}" for key in NodeConfig.model_fields)
        elif name == "controlplanes":
            yield "cluster.controlplanes[]"
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not EtcdConfig:
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
