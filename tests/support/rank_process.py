"""A rank without an engine: speaks dataplane.frames truly, and makes tokens that anyone can compute.

For tests of what surrounds ranks: it starts in milliseconds and obeys a few magic prompts.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import Capacity, Reason, ReasonKind
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.messages.weights import HeldWeights
from controlplane.runtime.packing import pack_u32, unpack_u32
from dataplane import frames
from dataplane.progress import ProgressPage

STEP_S = 0.002
VOCABULARY = 50_000

PROMPT_ABORT = 7_000_001
"""A sequence whose prompt begins with this token kills its rank in its first step."""

PROMPT_FAIL = 7_000_002
"""… makes its step fail in order."""

PROMPT_HANG = 7_000_003
"""… stops its rank's progress for good, deaf to Abort, at this collective:"""

HANG_COLLECTIVE = 3

CAPACITY = Capacity(total_blocks=1024, block_tokens=16, max_sequences=64, max_batch_tokens=2048, max_model_tokens=4096)


def token_at(prompt: bytes, seed: int, index: int) -> int:
    """Token `index` of a choice: a function of prompt, seed and index alone."""
    return zlib.crc32(prompt + seed.to_bytes(8, "little") + index.to_bytes(4, "little")) % VOCABULARY


def expected_tokens(prompt: bytes, seed: int, count: int, first: int = 0) -> list[int]:
    return [token_at(prompt, seed, index) for index in range(first, first + count)]


@dataclass
class _Sequence:
    submission: frames.Submission
    tokens: array[int]


class _Rank:
    def __init__(self, link: socket.socket, device: str, page: ProgressPage) -> None:
        self._link = link
        self._device = device
        self._page = page
        self._buffer = bytearray()
        self._running: dict[frames.SequenceId, _Sequence] = {}
        self._epoch = Epoch(0)
        self._driver = False
        self._step = 0
        self._weights = ""

    def run(self) -> None:
        self._send(frames.Hello(pid=os.getpid(), device=self._device))
        while True:
            readable, _, _ = select.select([self._link], [], [], STEP_S if self._running else None)
            if readable and not self._read():
                return
            if self._running:
                self._run_step()

    def _read(self) -> bool:
        data = self._link.recv(1 << 20)
        if not data:
            return False
        self._buffer += data
        while len(self._buffer) >= frames.LENGTH_BYTES:
            end = frames.LENGTH_BYTES + int.from_bytes(self._buffer[: frames.LENGTH_BYTES], "little")
            if len(self._buffer) < end:
                break
            frame = frames.decode_daemon_frame(bytes(self._buffer[frames.LENGTH_BYTES : end]))
            del self._buffer[:end]
            self._obey(frame)
        return True

    def _obey(self, frame: frames.DaemonFrame) -> None:
        match frame:
            case frames.Prepare():
                self._epoch, self._driver = frame.epoch, frame.rank == 0
                self._running.clear()
                self._send(frames.Prepared(frame.epoch, "127.0.0.1:1" if self._driver else "", self._weights))
            case frames.Form():
                self._send(frames.Formed(frame.epoch))
            case frames.Load():
                self._weights = "tiny"
                self._send(frames.LoadProgress(frame.epoch, "weights", 0.5))
                self._send(frames.Loaded(frame.epoch, CAPACITY, self._weights))
            case frames.Preload():
                held = HeldWeights(
                    deployment=frame.spec.deployment, degrees=frame.spec.degrees, rank=frame.rank, fingerprint="tiny"
                )
                self._weights = held.fingerprint
                self._send(frames.Holds(held))
            case frames.Submit():
                for submission in frame.sequences:
                    tokens = unpack_u32(submission.delivered)
                    self._running[submission.sequence] = _Sequence(submission, tokens)
            case frames.Cancel():
                for sequence in frame.sequences:
                    self._running.pop(sequence, None)
            case frames.Abort():
                self._running.clear()
                self._send(frames.Aborted(frame.epoch))
            case frames.Exit():
                raise SystemExit(0)

    def _run_step(self) -> None:
        self._step += 1
        self._page.advance()
        names = list(self._running)
        self._send(frames.StepBegun(self._epoch, self._step, pack_u32(names)))
        if not self._survives():
            return
        columns: tuple[list[int], list[int], list[int]] = ([], [], [])
        finished: list[frames.Finished] = []
        for name, sequence in list(self._running.items()):
            index = len(sequence.tokens)
            sequence.tokens.append(token_at(sequence.submission.prompt, sequence.submission.sampling.seed, index))
            for column, value in zip(columns, (name, index, sequence.tokens[-1]), strict=True):
                column.append(value)
            if index + 1 >= sequence.submission.sampling.max_tokens:
                finished.append(frames.Finished(name, FinishReason.LENGTH))
                del self._running[name]
        self._send(
            frames.StepDone(
                epoch=self._epoch,
                step=self._step,
                sequences=pack_u32(columns[0]),
                first_index=pack_u32(columns[1]),
                counts=pack_u32([1] * len(columns[0])),
                tokens=pack_u32(columns[2]),
                logprobs=(),
                finished=tuple(finished),
            )
        )
        self._report()

    def _survives(self) -> bool:
        """False if the step failed in order."""
        first = {unpack_u32(sequence.submission.prompt)[0] for sequence in self._running.values()}
        if PROMPT_ABORT in first:
            os.kill(os.getpid(), signal.SIGABRT)
        if PROMPT_HANG in first:
            self._page.set_collective(HANG_COLLECTIVE)
            while True:
                time.sleep(1)
        if PROMPT_FAIL in first:
            self._running.clear()
            reason = Reason(kind=ReasonKind.OUT_OF_MEMORY, text="no memory for the step")
            self._send(frames.Failed(self._epoch, "step", reason))
            return False
        return True

    def _report(self) -> None:
        self._send(
            frames.LoadReport(
                epoch=self._epoch,
                free_blocks=CAPACITY.total_blocks - len(self._running),
                running=len(self._running),
                waiting=0,
                waiting_tokens=0,
                step_ms=STEP_S * 1000,
                queue=(),
                prefix_digest=b"",
                admitted=(),
            )
        )

    def _send(self, frame: frames.RankFrame) -> None:
        self._link.sendall(frames.encode(frame))


def rank_main(socket_path: str, device: str, page_path: str) -> None:
    """The entry that the zygote calls."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect(socket_path)
        _Rank(link, device, ProgressPage.open(Path(page_path))).run()
