"""The whole harness against a server that is right by definition: stock vLLM, batched and cancelled, against itself."""

from __future__ import annotations

import pytest

from parity import workload
from parity.client import replay
from parity.compare import compare_all
from parity.reference import Reference, stock_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_stock_answers_the_same_twice(stock_reference: Reference) -> None:
    requests = workload.everything()
    with stock_server() as base_url:
        recordings = replay(base_url, requests)
    assert compare_all(requests, stock_reference.recordings, recordings, stock_reference.margins) == []
