"""Writes what really happens into the text scenarios. Review the difference before it is kept."""

from __future__ import annotations

from tests.scenario.worker.script import rewrite
from tests.scenario.worker.test_scenarios import SCENARIOS

if __name__ == "__main__":
    for scenario in SCENARIOS:
        rewrite(scenario)
