"""What every test may use: the choice between the fast set and everything, and stock vLLM's answers."""

from __future__ import annotations

import pytest

from parity import workload
from parity.reference import Reference, reference


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tests out unless they are asked for, by --slow or in -m."""
    if config.getoption("--slow") or "slow" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(scope="session")
def stock_reference() -> Reference:
    """What stock vLLM answers to the whole workload."""
    return reference(workload.everything())
