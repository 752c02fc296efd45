"""Whatever breaks: a gateway that syncs receives every token index of a choice once and in order, and its finish with
its last token."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from controlplane.runtime.ids import Attempt, RequestId, Slot
from controlplane.runtime.messages.serve import SlotCursor, StepTokens, SyncReply, SyncSlots
from controlplane.runtime.packing import unpack_u32
from dataplane.core.messages import Effect
from tests.scenario.worker.model import sent, serving

Key = tuple[str, int]

TOKENS_MAX = 30


@dataclass
class Journal:
    """What a gateway holds of one choice."""

    slot: Slot
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class Cursors(RuleBasedStateMachine):
    """A worker whose engine makes tokens at will, and a gateway whose stream is slow, breaks and comes back."""

    @initialize()
    def start(self) -> None:
        self.worker = serving()
        self.journals: dict[Key, Journal] = {}
        self.made: dict[Key, int] = {}
        self.done: set[Key] = set()
        self.on_the_way: deque[StepTokens] = deque()
        self.connected = True

    # ------------------------------------------------------------ the engine

    @rule(choices=st.integers(1, 3))
    @precondition(lambda self: self.connected and len(self.made) < 6)
    def open(self, choices: int) -> None:
        request = f"r{len(self.made)}"
        self._take(self.worker.open("g", request, choices=choices, max_tokens=TOKENS_MAX))
        for index, slot in enumerate(self.worker.slots_of(request)):
            self.journals[request, index] = Journal(slot)
            self.made[request, index] = 0

    @rule(data=st.data(), again=st.integers(0, 2))
    def step(self, data: st.DataObject, again: int) -> None:
        """Some choices get some tokens; the engine may repeat the last ones."""
        running = [key for key in self.made if key not in self.done]
        tokens: dict[Key, tuple[int, range]] = {}
        for key in data.draw(st.sets(st.sampled_from(running)) if running else st.just(set[Key]())):
            first = max(0, self.made[key] - again)
            end = min(TOKENS_MAX, self.made[key] + data.draw(st.integers(0, 4)))
            tokens[key] = (first, range(first, end))
            self.made[key] = end
        finished = {key for key in tokens if self.made[key] == TOKENS_MAX or data.draw(st.booleans())}
        self.done |= finished
        self._take(self.worker.step_ends("cpu:0", 1, tokens, sorted(finished)))

    # ------------------------------------------------------------ the stream

    @rule(count=st.integers(0, 3))
    @precondition(lambda self: self.connected)
    def read(self, count: int) -> None:
        """The gateway reads some of what is on its way; once all has left, the stream takes more."""
        for _ in range(min(count, len(self.on_the_way))):
            self._journal(self.on_the_way.popleft())
        if not self.on_the_way:
            self._take(self.worker.writable("g"))

    @rule()
    @precondition(lambda self: self.connected)
    def break_off(self) -> None:
        """What was on its way is lost."""
        self.worker.disconnect("g")
        self.on_the_way.clear()
        self.connected = False

    @rule(renumber=st.booleans())
    @precondition(lambda self: not self.connected)
    def come_back(self, renumber: bool) -> None:
        self.worker.connect("g")
        self.connected = True
        cursors = tuple(self._cursors(renumber))
        effects = self.worker.gateway_says("g", SyncSlots(slots=cursors))
        (reply,) = [body for body in sent(effects, self.worker, "g") if isinstance(body, SyncReply)]
        assert set(reply.known) == {cursor.slot for cursor in cursors}
        assert not reply.unknown
        self._take(effects)

    @rule()
    @precondition(lambda self: self.connected)
    def end_finished(self) -> None:
        """Requests whose every finish has come are ended by the gateway."""
        for name in {request for request, _ in self.journals}:
            keys = [key for key in self.journals if key[0] == name]
            if all(self.journals[key].finished for key in keys):
                self._check_complete(keys)
                for key in keys:
                    del self.journals[key]

    @invariant()
    def nothing_is_ahead(self) -> None:
        for key, journal in getattr(self, "journals", {}).items():
            assert len(journal.tokens) <= self.made[key]

    def teardown(self) -> None:
        """All heals: then everything arrives."""
        if not hasattr(self, "worker"):
            return
        if not self.connected:
            self.come_back(renumber=False)
        self.read(len(self.on_the_way))
        while self.on_the_way:
            self.read(len(self.on_the_way))
        self._check_complete(self.journals)

    # ------------------------------------------------------------ parts

    def _cursors(self, renumber: bool) -> Iterable[SlotCursor]:
        unfinished = [item for item in self.journals.items() if not item[1].finished]
        for offset, ((request, index), journal) in enumerate(unfinished):
            if renumber:
                journal.slot = Slot(
                    1000 + self.worker.links + offset + max(item.slot for item in self.journals.values())
                )
            yield SlotCursor(
                slot=journal.slot,
                request=RequestId(request),
                choice=index,
                attempt=Attempt(1),
                next_index=len(journal.tokens),
            )

    def _take(self, effects: list[Effect]) -> None:
        if self.connected:
            self.on_the_way += [body for body in sent(effects, self.worker, "g") if isinstance(body, StepTokens)]

    def _journal(self, step: StepTokens) -> None:
        by_slot = {journal.slot: journal for journal in self.journals.values()}
        start, tokens = 0, unpack_u32(step.tokens)
        columns = (unpack_u32(column) for column in (step.slots, step.first_index, step.counts))
        for slot, first, count in zip(*columns, strict=True):
            journal = by_slot[Slot(slot)]
            assert first == len(journal.tokens), "a gap or a repetition"
            journal.tokens.extend(tokens[start : start + count])
            start += count
        for finish in step.finish:
            assert not by_slot[finish.slot].finished, "finished twice"
            by_slot[finish.slot].finished = True

    def _check_complete(self, keys: Iterable[Key]) -> None:
        for key in keys:
            assert self.journals[key].tokens == list(range(self.made[key]))
            assert self.journals[key].finished == (key in self.done)


Cursors.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCursors = Cursors.TestCase
