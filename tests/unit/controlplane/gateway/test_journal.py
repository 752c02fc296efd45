"""The one delivery rule, and what a journal says of itself."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from controlplane.gateway.journal import ChoiceJournal, new_journal, take_fresh
from controlplane.runtime.ids import Epoch, ReplicaId, Slot, Term
from controlplane.runtime.messages.common import Permit
from controlplane.runtime.messages.route import JournalPhase
from controlplane.runtime.packing import unpack_u32
from tests.unit.controlplane.gateway.builders import R, accepted


def test_only_the_next_index_is_taken():
    choice = ChoiceJournal(index=0, seed=0)
    assert list(take_fresh(choice, 0, array("I", [5, 6])) or ()) == [5, 6]
    assert list(take_fresh(choice, 0, array("I", [5, 6])) or ()) == []
    assert list(take_fresh(choice, 1, array("I", [6, 7])) or ()) == [7]
    assert take_fresh(choice, 4, array("I", [9])) is None
    assert list(choice.tokens) == [5, 6, 7]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=40))
def test_any_order_of_slices_gives_a_prefix_of_the_truth(slices: list[tuple[int, int]]):
    truth = array("I", range(100, 112))
    choice = ChoiceJournal(index=0, seed=0)
    shown = array("I")
    for first, count in slices:
        fresh = take_fresh(choice, first, truth[first : first + count])
        shown.extend(fresh or ())
    assert shown == choice.tokens == truth[: len(shown)]


def test_a_new_attempts_body_carries_what_was_delivered():
    journal = new_journal(accepted(n=2), now=1.0)
    journal.choices[0].tokens.extend([7, 8])
    journal.choices[0].slot, journal.choices[1].slot = Slot(4), Slot(5)
    permit = Permit(request=R, attempt=journal.attempt, replica=ReplicaId("r"), epoch=Epoch(1), term=Term(1))
    body = journal.body(permit, now=2.0)
    assert list(unpack_u32(body.choices[0].delivered)) == [7, 8]
    assert [choice.slot for choice in body.choices] == [4, 5]
    assert list(unpack_u32(body.prompt)) == [1, 2, 3]


def test_the_entry_counts_waiting_and_budget_in_milliseconds():
    journal = new_journal(accepted(deadline=11.0), now=1.0)
    entry = journal.entry(2.5)
    assert (entry.waited_ms, entry.remaining_ms, entry.prompt_tokens) == (1500, 8500, 3)
    assert journal.info(2.5).phase is JournalPhase.ROUTING


def test_a_spent_budget_is_not_mistaken_for_none():
    assert new_journal(accepted(deadline=1.0), now=1.0).remaining_ms(5.0) == 1
