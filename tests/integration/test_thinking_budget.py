"""Requests whose thinking vLLM ends by force, in the middle of which a node dies: the same texts as without that."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import pytest

from integration.cluster import FLAGS, PATIENT_SECONDS, Cluster, running_cluster
from kevlarflow.faults import KillServing
from parity import workload

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

END = "one two three four five six seven eight nine ten eleven twelve</think>"
"""Long enough for a node to die in the middle of it."""
CONFIG = {"reasoning_start_str": "<think>", "reasoning_end_str": END}
BUDGETS = (4, 9)
TOKENS = 60


def test_the_end_of_a_thought_is_forced_once_though_a_node_dies_in_it() -> None:
    flags = (*FLAGS, f"--reasoning-config={json.dumps(CONFIG)}")
    with running_cluster(stages=2, pipelines=2, flags=flags, name="a cluster that forces ends") as cluster:
        expected = asyncio.run(texts(cluster, lambda _: None))
        assert all("six seven eight" in text for text in expected), expected
        for stage in (1, 0):
            struck: list[float] = []

            def kill(tokens: int, stage: int = stage, struck: list[float] = struck) -> None:
                # With the smaller budget well within the forced end, with the other one at its beginning.
                if tokens >= len(BUDGETS) * 14 and not struck:
                    struck.append(time.time())
                    cluster.inject(KillServing(0, stage))

            assert asyncio.run(texts(cluster, kill)) == expected
            assert struck, "they were to be hurt"
            cluster.wait_recovered(struck[0], 0, stage)
            cluster.wait_settled()


async def texts(cluster: Cluster, at: Callable[[int], None]) -> list[str]:
    """All answers of pipeline 0; `at` is called with the count of tokens that have come, of all together."""
    counted = [0]

    async def one(client: httpx.AsyncClient, budget: int) -> str:
        body = {
            "model": workload.MODEL,
            "prompt": f"Question {budget}: why is the sky blue?\n<think>",
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
            "thinking_token_budget": budget,
        }
        pieces = []
        async with client.stream("POST", "/v1/completions", json=body, headers={"X-data-parallel-rank": "0"}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                    counted[0] += 1
                    await asyncio.to_thread(at, counted[0])
        return "".join(pieces)

    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=PATIENT_SECONDS) as client:
        return list(await asyncio.gather(*(one(client, budget) for budget in BUDGETS)))
