"""The engine as a library, in a process of its own as its users have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from controlplane.runtime.errors import Rejected
from controlplane.runtime.messages.common import Sampling
from dataplane.engine.local import open_engine
from tests.support.models import tiny_model
from tests.unit.dataplane.engine import library_script
from tests.unit.dataplane.engine.reference import greedy

GREEDY = Sampling(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models"), "llama")


def test_one_rank_runs_in_this_process(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with open_engine(str(model), kv_cache_tokens=512) as engine:
        (answer,) = engine.generate(["the river"], GREEDY)
        (refused,) = engine.generate([[]], GREEDY)
    assert answer.prompt_tokens == tokenizer.encode("the river").ids
    assert answer.tokens == greedy(model, answer.prompt_tokens, 8)
    assert answer.text == tokenizer.decode(answer.tokens)
    assert refused.finished.error is not None
    assert "empty" in refused.finished.error.text


def test_text_needs_a_tokenizer(model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(model / name)
    with open_engine(str(tmp_path), kv_cache_tokens=512) as engine:
        assert engine.generate([[5, 6]], GREEDY)[0].text == ""
        with pytest.raises(Rejected, match=r"no tokenizer\.json"):
            engine.generate(["the river"], GREEDY)


def test_ranks_that_do_not_fit_the_degrees_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with (
        pytest.raises(Rejected, match="3 ranks were started for degrees that need 2"),
        open_engine(str(model), tensor=2),
    ):
        pass


@pytest.mark.matrix
@pytest.mark.parametrize(
    "launcher",
    [[sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]],
    ids=["by itself", "torchrun"],
)
def test_a_script_spreads_its_prompts_over_replicas(model: Path, launcher: list[str]) -> None:
    prompts = [[7, 8, 9], [11], list(range(40)), [3, 3], [200, 100]]
    done = subprocess.run(
        [*launcher, library_script.__file__, str(model), json.dumps(prompts)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [tokens for tokens, _ in told] == [greedy(model, prompt, 8) for prompt in prompts]
