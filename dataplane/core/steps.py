"""What engine steps give: tokens and finishes for choices, load figures for the leader."""

from __future__ import annotations

from array import array

from controlplane.runtime.messages.serve import Admitted
from controlplane.runtime.messages.session import SequencePhase
from controlplane.runtime.packing import unpack_u32
from dataplane import frames
from dataplane.core.cursors import flush, mark, send
from dataplane.core.messages import StreamId
from dataplane.core.shadows import finish_choice
from dataplane.core.state import Choice, Replica, Request, Turn
from dataplane.frames import SequenceId


class RankFault(Exception):
    """A rank broke the protocol; it is killed."""


def step_begun(replica: Replica, frame: frames.StepBegun) -> None:
    """Whom to suspect if the step never ends."""
    replica.steps[frame.step] = unpack_u32(frame.sequences)


def step_done(turn: Turn, replica: Replica, frame: frames.StepDone) -> None:
    """Give every choice its tokens, then each gateway one message. Sequences that were stopped meanwhile are passed
    over. Raises RankFault."""
    replica.steps.pop(frame.step, None)
    _take_logprobs(turn, frame)
    streams = _take_tokens(turn, frame) | _take_finishes(turn, frame)
    for stream in streams:
        flush(turn, turn.state.streams[stream])


def load_report(turn: Turn, replica: Replica, frame: frames.LoadReport) -> None:
    """Figures for the next heartbeat; requests that the engine scheduled are running."""
    replica.load = frame
    turn.state.heartbeat_due = True
    for admitted in frame.admitted:
        held = turn.state.sequences.get(admitted.sequence)
        if held is None:
            continue
        request, _ = held
        request.phase = SequencePhase.RUNNING
        request.cached_tokens = request.cached_tokens or admitted.cached_tokens
        if request.stream is not None and admitted.cached_tokens:
            body = Admitted(request=request.request, attempt=request.attempt, cached_tokens=admitted.cached_tokens)
            send(turn, turn.state.streams[request.stream], body)


def _take_tokens(turn: Turn, frame: frames.StepDone) -> dict[StreamId, None]:
    touched: dict[StreamId, None] = {}
    tokens, start = unpack_u32(frame.tokens), 0
    columns = unpack_u32(frame.sequences), unpack_u32(frame.first_index), unpack_u32(frame.counts)
    if not len(columns[0]) == len(columns[1]) == len(columns[2]) or sum(columns[2]) != len(tokens):
        raise RankFault("the columns of a step differ in length")
    for sequence, first, count in zip(*columns, strict=True):
        held = turn.state.sequences.get(SequenceId(sequence))
        if held is not None:
            request, choice = held
            _append(choice, first, tokens[start : start + count])
            request.phase = SequencePhase.RUNNING
            _touch(turn, request, choice, touched)
        start += count
    return touched


def _append(choice: Choice, first: int, tokens: array[int]) -> None:
    gap = len(choice.tokens) - first
    if gap < 0:
        raise RankFault(f"sequence {choice.sequence} goes on at {first}, not at {len(choice.tokens)}")
    choice.tokens.extend(tokens[gap:])


def _take_finishes(turn: Turn, frame: frames.StepDone) -> dict[StreamId, None]:
    touched: dict[StreamId, None] = {}
    for finished in frame.finished:
        held = turn.state.sequences.get(finished.sequence)
        if held is None:
            continue
        request, choice = held
        finish_choice(turn, request, choice, finished.reason, finished.stop_id, finished.error)
        _touch(turn, request, choice, touched)
        turn.state.heartbeat_due = True
    return touched


def _take_logprobs(turn: Turn, frame: frames.StepDone) -> None:
    for entry in frame.logprobs:
        held = turn.state.sequences.get(entry.sequence)
        if held is None:
            continue
        if entry.prompt:
            held[1].prompt_logprobs.append(entry)
        else:
            held[1].logprobs[entry.index] = entry


def _touch(turn: Turn, request: Request, choice: Choice, touched: dict[StreamId, None]) -> None:
    if request.stream is not None:
        mark(turn.state.streams[request.stream], choice)
        touched[request.stream] = None
