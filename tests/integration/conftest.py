"""The clusters that tests share. Each test gets them settled: every node at home, no request left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.cluster import FLAGS, PATIENT_SECONDS, Cluster, running_cluster


@pytest.fixture(scope="session")
def started_grid() -> Iterator[Cluster]:
    flags = (*FLAGS, f"--replacement-wait={PATIENT_SECONDS}")
    with running_cluster(stages=2, pipelines=2, flags=flags, name="the shared 2 x 2 cluster") as cluster:
        yield cluster


@pytest.fixture
def grid(started_grid: Cluster) -> Cluster:
    """The shared 2 x 2 cluster."""
    started_grid.wait_settled()
    return started_grid
