"""The scale world, small: every phase ends as it should, and growth is fitted as it is."""

from __future__ import annotations

import pytest

from tools.sim.scale import RACK_SHARE, ScaleWorld, growth, table


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, 1.0), (2.0, 2.0)])
def test_growth_is_the_exponent(exponent: float, expected: float) -> None:
    sizes = [10, 20, 40, 80]
    assert growth(sizes, [3.0 * size**exponent for size in sizes]) == pytest.approx(expected)


def test_a_small_cluster_loses_a_rack_and_forgets_nothing() -> None:
    run = ScaleWorld(40).run()
    assert run.regrouped == 40 * RACK_SHARE
    assert run.replayed > 0
    assert all(seconds > 0 for seconds in run.phases.values())
    assert "lose a rack (s)" in table([run])
