"""All times from two, in an order that detects failures soundly."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from controlplane.runtime import timing
from controlplane.runtime.messages.common import TimingSpec
from controlplane.runtime.timing import (
    TimingError,
    channel_options,
    derive_timings,
    public_server_options,
    server_options,
    timings_from_spec,
)


def test_the_defaults_are_those_of_the_protocol() -> None:
    timings = derive_timings()
    assert (timings.failure_timeout, timings.heartbeat_interval) == (3.0, 0.5)
    assert (timings.lease_ttl, timings.keepalive_period, timings.keepalive_deadline) == (3, 0.5, 0.75)
    assert (timings.lease_trust, timings.session_silence) == (2.5, 1.5)
    assert (timings.ping_time, timings.ping_timeout) == (1.0, 0.5)
    assert (timings.probe_gap, timings.probe_connect) == (0.05, 0.25)
    assert (timings.progress_deadline, timings.collective_timeout) == (2.0, 2.5)
    assert (timings.leader_grace, timings.stage, timings.resume_grace) == (4.0, 3.0, 30.0)
    assert (timings.reconnect_min, timings.reconnect_max) == (0.05, 0.5)


@given(f=st.floats(1, 600), share=st.floats(0.001, 1 / 6))
def test_every_accepted_pair_is_in_order(f: float, share: float) -> None:
    h = f * share
    try:
        t = derive_timings(f, h)
    except TimingError:
        assert h < 0.05 or f < 6 * h
        return
    assert 2 * h < t.session_silence <= t.progress_deadline < t.collective_timeout < f
    assert t.keepalive_period <= t.lease_ttl / 3
    # Several renewals fit into the time that the last one is trusted for, each with its deadline.
    assert t.keepalive_period + t.keepalive_deadline < t.lease_trust < t.lease_ttl <= f
    # Noticed by lease at the latest a second after the failure timeout.
    assert t.lease_ttl + timing.ETCD_EXPIRY_LAG_S <= f + 1
    assert t.leader_grace > t.lease_ttl + timing.ETCD_EXPIRY_LAG_S - 1
    assert t.reconnect_min <= t.reconnect_max
    assert 2 * t.probe_connect + t.probe_gap < f


@pytest.mark.parametrize(
    ("f", "h", "text"),
    [
        (3.0, 0.04, r"heartbeat_interval \(0.04 s\) must be at least 0.05 s"),
        (3.0, 0.6, r"failure_timeout \(3 s\) must be at least 6 × heartbeat_interval \(0.6 s\)"),
        (0.9, 0.1, r"failure_timeout \(0.9 s\) must be at least 1 s"),
        (float("nan"), 0.5, "failure_timeout"),
        (3.0, float("nan"), "heartbeat_interval"),
    ],
)
def test_the_wrong_pair_is_named(f: float, h: float, text: str) -> None:
    with pytest.raises(TimingError, match=text):
        derive_timings(f, h)


@given(f=st.integers(1000, 600_000), h=st.integers(50, 100_000))
@example(f=17_682, h=2_947)
def test_the_spec_carries_whole_milliseconds(f: int, h: int) -> None:
    spec = TimingSpec(failure_timeout_ms=f, heartbeat_interval_ms=h)
    try:
        timings = timings_from_spec(spec)
    except TimingError:
        assert f < 6 * h
        return
    assert timings.to_spec() == spec
    assert timings_from_spec(timings.to_spec()) == timings


def test_both_ends_bound_a_ping_by_the_option_that_acts() -> None:
    timings = derive_timings(6.0, 0.75)
    for options in (dict(server_options(timings)), dict(channel_options(timings))):
        assert options["grpc.http2.ping_timeout_ms"] == 750
        assert options["grpc.keepalive_time_ms"] == 1000
        assert options["grpc.keepalive_permit_without_calls"] == 1
        assert options["grpc.http2.max_pings_without_data"] == 0
    server = dict(server_options(timings))
    assert server["grpc.so_reuseport"] == 0
    assert server["grpc.http2.max_ping_strikes"] == 0
    # Pings at the client's pace are no strike.
    assert server["grpc.http2.min_recv_ping_interval_without_data_ms"] < 1000
    client = dict(channel_options(timings))
    assert client["grpc.use_local_subchannel_pool"] == 1
    assert client["grpc.initial_reconnect_backoff_ms"] == 100
    # One attempt to connect.
    assert client["grpc.min_reconnect_backoff_ms"] == round(timings.session_silence * 1000) > 1000
    assert client["grpc.max_reconnect_backoff_ms"] == 750


def test_a_late_client_is_given_more_time_than_a_peer() -> None:
    timings = derive_timings(6.0, 0.75)
    assert dict(public_server_options(timings))["grpc.http2.ping_timeout_ms"] == 60_000
    same = {"grpc.http2.ping_timeout_ms", "grpc.keepalive_timeout_ms"}
    ours, peers = dict(public_server_options(timings)), dict(server_options(timings))
    assert {name for name in ours if ours[name] != peers[name]} == same


def test_timings_are_compared_by_value() -> None:
    assert derive_timings(4.0, 0.5) == replace(derive_timings(4.0, 0.5))
    assert derive_timings(4.0, 0.5) != derive_timings(4.0, 0.6)
