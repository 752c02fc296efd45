"""Records in etcd: JSON that returns as it went, and that a newer version may extend."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.runtime.records import (
    ClusterRecord,
    DeploymentRecord,
    LeaderRecord,
    NodeRecord,
    PeerRecord,
    PlacementRecord,
    from_json,
    to_json,
)
from tests.support.protocol import records

ALL = (ClusterRecord, LeaderRecord, PeerRecord, NodeRecord, DeploymentRecord, PlacementRecord)


@pytest.mark.parametrize("cls", ALL)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_record_returns_as_it_went(cls: type, data: st.DataObject) -> None:
    record = data.draw(records(cls))
    stored = to_json(record)
    assert from_json(stored, cls) == record
    # Guards compare bytes: the same record must always be the same bytes.
    assert to_json(from_json(stored, cls)) == stored
    json.loads(stored)


def test_a_field_of_a_newer_version_is_passed_over() -> None:
    stored = b'{"name":"a","incarnation":"i","term":1,"address":"h:1","pid":2,"novel":true}'
    assert from_json(stored, LeaderRecord).term == 1


def test_a_field_that_an_older_version_left_out_has_its_default() -> None:
    stored = b'{"name":"a","incarnation":"i","address":"h:1","url":"","pid":2}'
    assert from_json(stored, PeerRecord).boot_id == ""


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        (b'{"name":"a","incarnation":"i","term":"1","address":"h:1","pid":2}', r"\$\.term"),
        (b'{"name":"a","incarnation":"i","address":"h:1","pid":2}', "term"),
        (b"[]", "Expected `object`"),
    ],
)
def test_what_cannot_be_read_is_named(stored: bytes, text: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=text):
        from_json(stored, LeaderRecord)
