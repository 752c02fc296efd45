"""Silence is counted only while the judge itself ran."""

from __future__ import annotations

from controlplane.gateway.silence import Silence
from controlplane.runtime.timing import derive_timings

TIMINGS = derive_timings()
H = TIMINGS.heartbeat_interval


def test_three_quiet_intervals_are_too_many():
    silence = Silence(TIMINGS, 0.0)
    assert [silence.tick(H), silence.tick(2 * H), silence.tick(3 * H)] == [False, False, True]


def test_a_frame_starts_the_count_anew():
    silence = Silence(TIMINGS, 0.0)
    silence.tick(H)
    silence.tick(2 * H)
    silence.heard(2.5 * H)
    assert not silence.tick(3 * H)
    assert silence.heard_at == 2.5 * H


def test_a_stopped_judge_blames_nobody():
    silence = Silence(TIMINGS, 0.0)
    silence.tick(H)
    silence.tick(2 * H)
    assert not silence.tick(100 * H)
    assert not silence.tick(101 * H)


def test_a_late_tick_counts_two_intervals_at_most():
    silence = Silence(TIMINGS, 0.0)
    assert not silence.tick(2.9 * H)
    assert silence.tick(3.9 * H)
