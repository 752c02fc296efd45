"""Real processes, forked once for a test run, that each run a function as one rank of a mesh."""

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
from typing import Any, BinaryIO

import msgspec
import torch

from controlplane.runtime.messages.common import ParallelDegrees
from dataplane.parallel.mesh import Formation, Mesh, Rendezvous, form_mesh
from dataplane.zygote import die_with_parent

HOST = "127.0.0.1"
FORM_S = 60.0
"""The first job waits for processes that import torch one after another on a small machine."""


IMPORTS = ("dataplane.engine.engine", "dataplane.engine.follower", "transformers.models.llama.modeling_llama")
"""What most jobs need, imported once for all ranks: it takes longer than most jobs."""


class RankPool:
    """`size` processes, forked from one that has imported what they need. Use it in a `with`; what the ranks print goes
    to `log`."""

    def __init__(self, size: int, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        jobs, answers = [os.pipe() for _ in range(size)], [os.pipe() for _ in range(size)]
        theirs = [end for (reader, _), (_, writer) in zip(jobs, answers, strict=True) for end in (reader, writer)]
        with log.open("wb") as output:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ranks", str(os.getpid()), *map(str, theirs)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=theirs,
            )
        for end in theirs:
            os.close(end)
        self._jobs = [os.fdopen(writer, "wb", buffering=0) for _, writer in jobs]
        self._answers_of = [os.fdopen(reader, "rb") for reader, _ in answers]

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Its children die with it.
        self._parent.kill()
        self._parent.wait()
        for pipe in (*self._jobs, *self._answers_of):
            pipe.close()

    def run(self, function: str, ranks: int, timeout_s: float = 150.0, **arguments: Any) -> list[Any]:
        """`function` ("module:name") as `name(ranks: Ranks, **arguments)` on the first `ranks` processes.

        Arguments and results are plain data. Raises AssertionError with the traceback of the ranks that failed.
        """
        rendezvous = Rendezvous.listen(HOST)
        job = msgspec.json.encode([function, ranks, rendezvous.address, arguments]) + b"\n"
        for pipe in self._jobs[:ranks]:
            pipe.write(job)
        answers = self._answers(ranks, time.monotonic() + timeout_s)
        failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def _answers(self, ranks: int, deadline: float) -> list[tuple[str, Any]]:
        answers: dict[int, tuple[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for index, pipe in enumerate(self._answers_of[:ranks]):
                selector.register(pipe, selectors.EVENT_READ, index)
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

    def device(self, kind: str) -> torch.device:
        """This rank's: the CPU, or a GPU of its own."""
        if kind == "cpu":
            return torch.device("cpu")
        torch.cuda.set_device(self.rank)
        return torch.device("cuda", self.rank)

    def mesh(self, timeout_s: float = 20.0, kind: str = "cpu", **degrees: int) -> Mesh:
        """Form the next epoch's mesh over all ranks of the job, on devices of a kind."""
        self._epoch += 1
        formation = Formation(
            degrees=ParallelDegrees(**degrees),
            hosts=(HOST,) * self.size,
            nonce=f"test{self._rendezvous.store.port}",
            epoch=self._epoch,
            backend="gloo" if kind == "cpu" else "nccl",
            collective_timeout_s=timeout_s,
        )
        return form_mesh(formation, self.rank, self.device(kind), self._rendezvous, time.monotonic() + FORM_S)


def _serve(rank: int, jobs: BinaryIO, answers: BinaryIO) -> None:
    torch.set_num_threads(1)
    for line in jobs:
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


def _fork_all(pool: int, pairs: list[tuple[int, int]]) -> None:
    """Fork a rank for each pair (jobs to read, answers to write); wait for their end."""
    die_with_parent(pool)
    for module in IMPORTS:
        importlib.import_module(module)
    parent = os.getpid()
    for rank, (jobs, answers) in enumerate(pairs):
        if os.fork() == 0:
            die_with_parent(parent)
            for other in pairs:
                if other != (jobs, answers):
                    os.close(other[0])
                    os.close(other[1])
            _serve(rank, os.fdopen(jobs, "rb"), os.fdopen(answers, "wb"))
            os._exit(0)
    for pair in pairs:
        os.close(pair[0])
        os.close(pair[1])
    for _ in pairs:
        os.wait()


if __name__ == "__main__":
    ends = [int(word) for word in sys.argv[2:]]
    _fork_all(int(sys.argv[1]), list(zip(ends[::2], ends[1::2], strict=True)))
