"""The lines that `perdure up` offers to paste do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.tools.test_state import running
from tools.up.banner import banner
from tools.up.state import StateError, check_writable, default_state_dir


def ctl_line(folder: Path) -> str:
    (line,) = (line for line in banner(running(1), folder).splitlines() if " ctl status" in line)
    return line.partition(" ctl ")[2]


def test_ctl_is_told_of_a_cluster_that_it_would_not_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert ctl_line(default_state_dir("local")) == "status"
    for elsewhere in (default_state_dir("lab"), tmp_path / "state"):
        assert ctl_line(elsewhere) == "status --address 127.0.0.1:7700"


def test_a_ready_file_that_cannot_be_written_is_named_before_the_start(tmp_path: Path) -> None:
    check_writable(tmp_path / "ready.json")
    with pytest.raises(StateError, match=r"/no/such/file cannot be written: /no/such is no folder"):
        check_writable(Path("/no/such/file"))
    with pytest.raises(StateError, match="it is a folder"):
        check_writable(tmp_path)
