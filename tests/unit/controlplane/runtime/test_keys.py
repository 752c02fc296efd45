"""Names of keys: each below its cluster's own prefix, none able to leave it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.runtime.errors import Rejected
from controlplane.runtime.etcd_types import prefix_end
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from controlplane.runtime.keys import Keys


def test_the_keys_of_the_records() -> None:
    keys = Keys("prod")
    assert keys.prefix == "/perdure/prod/"
    assert [keys.cluster, keys.term, keys.leader] == [
        "/perdure/prod/cluster",
        "/perdure/prod/term",
        "/perdure/prod/leader",
    ]
    assert keys.peer("cp1") == "/perdure/prod/controlplanes/cp1"
    assert keys.node(NodeId("n1")) == "/perdure/prod/nodes/n1"
    assert keys.deployment(DeploymentId("d")) == "/perdure/prod/deployments/d"
    assert keys.deleted_deployment(DeploymentId("d")) == "/perdure/prod/deleted/d"
    assert keys.placement(ReplicaId("d-0")) == "/perdure/prod/placements/d-0"


@pytest.mark.parametrize("name", ["", "a/b", "../x/", "ü", "a\n"])
def test_a_name_that_would_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(Rejected, match="cluster name"):
        Keys(name)
    with pytest.raises(Rejected, match="node name"):
        Keys("ok").node(NodeId(name))


NAMES = st.text(st.characters(min_codepoint=1, max_codepoint=126), min_size=1)


@given(prefix=NAMES, key=NAMES)
def test_a_range_ends_behind_everything_with_its_prefix(prefix: str, key: str) -> None:
    inside = prefix.encode() <= key.encode() < prefix_end(prefix)
    assert inside == key.startswith(prefix)
