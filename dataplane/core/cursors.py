"""Tokens on their way to gateways: cursors, not queues.

Every choice keeps its tokens and the index of the next one to send. When a stream is writable, one message takes
all that any of its slots has since, so that a slow gateway costs no memory and delays nobody else.
"""

from __future__ import annotations

from array import array

from controlplane.runtime.ids import Slot
from controlplane.runtime.messages.serve import Finish, ServeDown, StepTokens, TokenLogprobs
from controlplane.runtime.packing import pack_u32
from dataplane import frames
from dataplane.core.messages import SendGateway
from dataplane.core.state import Choice, Request, Stream, Turn

MESSAGE_TOKENS_MAX = 1 << 20
MESSAGE_LOGPROBS_MAX = 1 << 14
"""What one message takes at most; the rest goes with the next."""


def send(turn: Turn, stream: Stream, body: ServeDown) -> None:
    """Put one frame on the stream; it is writable again when the shell says so."""
    stream.writable = False
    stream.last_sent = turn.now
    turn.emit(SendGateway(stream.stream, body))


def mark(stream: Stream, choice: Choice) -> None:
    """Note that the choice has something to send."""
    if choice.pending and not choice.closed:
        stream.dirty[choice.slot] = None


def flush(turn: Turn, stream: Stream) -> None:
    """Send what there is, if the stream takes it."""
    if stream.writable and stream.dirty:
        send(turn, stream, take(stream))


def flush_all(turn: Turn, stream: Stream) -> None:
    """Send all there is although the stream is busy: what follows must come after it."""
    while stream.dirty:
        send(turn, stream, take(stream))


def take(stream: Stream) -> StepTokens:
    """One message with everything since the cursors, which it moves."""
    message = _Message()
    for slot in list(stream.dirty):
        if message.full:
            break
        _, choice = stream.slots[slot]
        message.add(slot, choice)
        if not choice.pending:
            del stream.dirty[slot]
    return message.build()


def bind(stream: Stream, request: Request, choice: Choice, slot: Slot) -> None:
    """From now on `slot` of this stream stands for the choice."""
    choice.slot = slot
    stream.slots[slot] = (request, choice)
    mark(stream, choice)


def unbind(stream: Stream, choice: Choice) -> None:
    """The choice's slot is dead; a no-op if it was already."""
    holder = stream.slots.get(choice.slot)
    if holder is not None and holder[1] is choice:
        del stream.slots[choice.slot]
        stream.dirty.pop(choice.slot, None)


def rewind(choice: Choice, next_index: int) -> None:
    """The gateway holds the tokens below `next_index` and nothing after them."""
    assert choice.delivered <= next_index <= len(choice.tokens)
    choice.sent = next_index
    choice.finish_sent = False
    if next_index == choice.delivered:
        choice.prompt_logprobs_sent = 0


class _Message:
    """A StepTokens being filled."""

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._first: list[int] = []
        self._counts: list[int] = []
        self._tokens = array("I")
        self._logprobs: list[TokenLogprobs] = []
        self._finish: list[Finish] = []

    @property
    def full(self) -> bool:
        return len(self._tokens) >= MESSAGE_TOKENS_MAX or len(self._logprobs) >= MESSAGE_LOGPROBS_MAX

    def add(self, slot: Slot, choice: Choice) -> None:
        """Take what the choice has, as far as there is room, and its finish if that was all."""
        self._take_prompt_logprobs(slot, choice)
        room = MESSAGE_TOKENS_MAX - len(self._tokens)
        if choice.logprobs:
            room = min(room, max(0, MESSAGE_LOGPROBS_MAX - len(self._logprobs)))
        end = min(len(choice.tokens), choice.sent + room)
        if end > choice.sent:
            self._slots.append(slot)
            self._first.append(choice.sent)
            self._counts.append(end - choice.sent)
            self._tokens.extend(choice.tokens[choice.sent : end])
            self._take_logprobs(slot, choice, end)
            choice.sent = end
        if choice.finish is not None and not choice.finish_sent and choice.sent == len(choice.tokens):
            choice.finish_sent = True
            self._finish.append(Finish(slot=slot, reason=choice.finish, stop_id=choice.stop_id, error=choice.error))

    def _take_prompt_logprobs(self, slot: Slot, choice: Choice) -> None:
        fresh = choice.prompt_logprobs[choice.prompt_logprobs_sent :]
        choice.prompt_logprobs_sent = len(choice.prompt_logprobs)
        self._logprobs.extend(_logprobs(slot, entry) for entry in fresh)

    def _take_logprobs(self, slot: Slot, choice: Choice, end: int) -> None:
        if choice.logprobs:
            entries = (choice.logprobs.get(index) for index in range(choice.sent, end))
            self._logprobs.extend(_logprobs(slot, entry) for entry in entries if entry is not None)

    def build(self) -> StepTokens:
        return StepTokens(
            slots=pack_u32(self._slots),
            first_index=pack_u32(self._first),
            counts=pack_u32(self._counts),
            tokens=pack_u32(self._tokens),
            logprobs=tuple(self._logprobs),
            finish=tuple(self._finish),
        )


def _logprobs(slot: Slot, entry: frames.Logprobs) -> TokenLogprobs:
    return TokenLogprobs(
        slot=slot,
        index=entry.index,
        chosen=entry.chosen,
        chosen_rank=entry.chosen_rank,
        top_ids=entry.top_ids,
        top_values=entry.top_values,
        prompt=entry.prompt,
    )
