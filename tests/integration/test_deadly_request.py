"""A request that kills each node that computes it: after two it ends with an error, and everybody else goes on."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from integration import deadly
from integration.cluster import FLAGS, PATIENT_SECONDS, Cluster, running_cluster
from integration.failover import assert_identical
from parity import workload
from parity.client import Replay, replay
from parity.reference import Reference

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

TESTS = Path(__file__).parents[1]
DEADLY_AFTER = 5
REASON = "2 nodes were lost while they computed this request: it is not tried again"


def test_it_costs_two_nodes_and_ends_alone(stock_reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":")
    # Beside a deadly step there are no others in its pipeline: they would share its fate.
    streams = [dataclasses.replace(each, pipeline=0) for each in workload.steady()]
    flags = (*FLAGS, f"--replacement-wait={PATIENT_SECONDS}", deadly.FLAG)
    with running_cluster(
        stages=2, pipelines=2, flags=flags, name="a cluster with a deadly logits processor"
    ) as cluster:
        told: list[dict[str, Any]] = []

        async def kill(current: Replay) -> None:
            assert await current.reached(lambda progress: progress.tokens > 2 * len(streams))
            told.extend(await deadly_events(cluster))

        recordings = replay(cluster.base_url, streams, pipelines=cluster.pipelines, beside=kill)
        assert_identical(streams, stock_reference, recordings)
        *tokens, error = told
        assert error["error"]["message"] == REASON
        assert sum(len(choice["token_ids"]) for event in tokens for choice in event["choices"]) == DEADLY_AFTER
        dead = re.findall(r"died \(pid (\d+): SIGSEGV\)", cluster.serve_log.read_text())
        assert len(set(dead)) == 2, dead
        cluster.wait_settled()


async def deadly_events(cluster: Cluster) -> list[dict[str, Any]]:
    """What the client of a deadly request hears, up to the end of its stream."""
    body = {"model": workload.MODEL, "prompt": "The end", "max_tokens": 50, "stream": True, "return_token_ids": True}
    body["vllm_xargs"] = {"deadly_after": DEADLY_AFTER}
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=PATIENT_SECONDS) as client:
        headers = {"X-data-parallel-rank": "1"}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            lines = [line async for line in answer.aiter_lines()]
    texts = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(text) for text in texts if text != "[DONE]"]
