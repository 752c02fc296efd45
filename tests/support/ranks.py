"""Real processes, started once for a test run, that each run a function as one rank of a mesh."""

from __future__ import annotations

import importlib
import os
import selectors
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import torch

from controlplane.runtime.messages.common import ParallelDegrees
from dataplane.parallel.mesh import Formation, Mesh, Rendezvous, form_mesh

HOST = "127.0.0.1"
FORM_S = 60.0
"""The first job waits for processes that import torch one after another on a small machine."""


class RankPool:
    """`size` processes. Use it in a `with`; what the ranks print goes to `log`."""

    def __init__(self, size: int, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._log = log.open("wb")
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.ranks", str(rank)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
            for rank in range(size)
        ]

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()
        self._log.close()

    def run(self, function: str, ranks: int, timeout_s: float = 150.0, **arguments: Any) -> list[Any]:
        """`function` ("module:name") as `name(ranks: Ranks, **arguments)` on the first `ranks` processes.

        Arguments and results are plain data. Raises AssertionError with the traceback of the ranks that failed.
        """
        rendezvous = Rendezvous.listen(HOST)
        job = msgspec.json.encode([function, ranks, rendezvous.address, arguments]) + b"\n"
        for rank in self._ranks[:ranks]:
            assert rank.stdin is not None
            rank.stdin.write(job)
            rank.stdin.flush()
        answers = self._answers(ranks, time.monotonic() + timeout_s)
        failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def _answers(self, ranks: int, deadline: float) -> list[tuple[str, Any]]:
        answers: dict[int, tuple[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for index, rank in enumerate(self._ranks[:ranks]):
                assert rank.stdout is not None
                selector.register(rank.stdout, selectors.EVENT_READ, index)
            while len(answers) < ranks:
                ready = selector.select(max(deadline - time.monotonic(), 0))
                assert ready, f"ranks {sorted(set(range(ranks)) - set(answers))} did not answer"
                for key, _ in ready:
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    answers[key.data] = msgspec.json.decode(line) if line else ("it died", None)
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(ranks)]


class Ranks:
    """What a function on a rank gets: its number, and meshes, one epoch after another."""

    def __init__(self, rank: int, size: int, address: str) -> None:
        self.rank = rank
        self.size = size
        self._rendezvous = Rendezvous.join(address, time.monotonic() + FORM_S)
        self._epoch = 0

    def mesh(self, timeout_s: float = 20.0, **degrees: int) -> Mesh:
        """Form the next epoch's mesh over all ranks of the job."""
        self._epoch += 1
        formation = Formation(
            degrees=ParallelDegrees(**degrees),
            hosts=(HOST,) * self.size,
            nonce=f"test{self._rendezvous.store.port}",
            epoch=self._epoch,
            backend="gloo",
            collective_timeout_s=timeout_s,
        )
        return form_mesh(formation, self.rank, torch.device("cpu"), self._rendezvous, time.monotonic() + FORM_S)


def _serve(rank: int) -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        function, size, address, arguments = msgspec.json.decode(line)
        module, _, name = function.partition(":")
        try:
            value = getattr(importlib.import_module(module), name)(Ranks(rank, size, address), **arguments)
            answer = ("", value)
        # Supervision: what a job raises fails the test that asked, not the rank.
        except Exception:  # noqa: BLE001
            answer = (traceback.format_exc(), None)
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
