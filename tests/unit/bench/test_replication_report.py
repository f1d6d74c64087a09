"""Tables of the experiments about replication, and what they say of the requirements."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from kevlarflow.bench import resume
from kevlarflow.bench.kv_cache import Sent, counted, fullest_standby, kv_cache, lag_tokens, sent
from kevlarflow.bench.measure import LoadSummary
from kevlarflow.bench.memory_copy import copy_seconds
from kevlarflow.bench.recipes import Recipe
from kevlarflow.bench.replication_report import above, cost_table, draw_resume, memory_table, resume_table
from kevlarflow.bench.replication_results import (
    CostLoad,
    MemorySample,
    ReplicationCost,
    Resume,
    Resumption,
    StandbyMemory,
)
from kevlarflow.bench.resume import Plan, restored_blocks
from kevlarflow.bench.systems import SystemFailed


def phases(**seconds):
    return dict.fromkeys(("detect", "plan", "relink", "restore", "recompute", "reissue", "total"), 0.1) | seconds


def point(context, restore=0.01, copy=0.01, replicated=True, recomputed=50, void=None, total=0.1, number=1):
    return Resumption(
        context, replicated, streams=8, number=number, block_size=128, live_tokens=8 * context,
        phases=phases(restore=restore, total=total),
        recomputed_tokens=recomputed, restored_bytes=context << 10, copy_seconds=copy, void=void,
    )  # fmt: skip


def remarks(*points):
    return "\n".join(resume_table(Resume(2, points=list(points))).remarks)


def test_the_time_above_that_of_the_shortest_contexts_is_told_in_plain_copies_of_the_bytes_restored():
    short, long = point(256, restore=0.020, copy=0.010), point(4096, restore=0.140, copy=0.100, total=0.245)
    result = Resume(2, points=[short, long])
    assert above(result, long, ("relink", "restore")) == pytest.approx(0.12)
    assert above(result, long, ("total",)) == pytest.approx(0.145)
    assert above(result, short, ("total",)) is None
    table = resume_table(result)
    assert [row[-3:-1] for row in table.rows] == [("-", "-"), ("+145 ms", "1.45")]
    assert "worst 1.45: reached" in remarks(short, long)
    assert "worst 1.55: NOT REACHED" in remarks(short, point(4096, copy=0.100, total=0.255))


def test_it_is_told_where_the_time_above_that_of_the_shortest_contexts_goes():
    short, long = point(256, restore=0.020, copy=0.010), point(4096, restore=0.140, copy=0.100, total=0.23)
    long.phases |= {"reissue": 0.13, "detect": 0.08}
    short.step_seconds, long.step_seconds = 0.05, 0.08
    assert (
        "4096 tokens, ms above 256 tokens: +130, of which -20 detecting and planning, +120 relinking and restoring, "
        "+0 computing again, +30 issuing again. Relinking and restoring alone: 1.20 copies. "
        "An ordinary step takes +30 ms."
    ) in remarks(short, long)
    assert "the same beside the step that is issued again at most 1.5; worst 1.00: reached" in remarks(short, long)


def test_a_point_that_is_interrupted_is_void_and_measured_again(monkeypatch):
    class Interrupted:
        def __init__(self, *_):
            pass

        async def measure(self):
            raise asyncio.CancelledError

    monkeypatch.setattr(resume, "_Point", Interrupted)
    monkeypatch.setattr(resume, "kv_cache", lambda *_: SimpleNamespace(block_size=128))
    monkeypatch.setattr(resume, "read_page", lambda *_: "")
    monkeypatch.setattr(resume, "run_folder_of", lambda _: None)
    monkeypatch.setattr(resume, "Watcher", lambda _: SimpleNamespace(start=lambda: None, close=lambda: None))
    result, plan = Resume(2), Plan(Recipe(), contexts=(256,), rounds=1)
    system = SimpleNamespace(address=SimpleNamespace(port=1))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(resume._points(plan, [(1, 256)], True, result, system, lambda _: None))
    assert plan.missing(result, replicated=True) == [(1, 256)]
    table = resume_table(result)
    assert table.rows == []
    assert f"void: {resume.UNFINISHED}" in table.remarks[0]


def test_the_pause_of_the_clients_stands_beside_the_clusters_own_total():
    points = [point(256, total=0.3, number=number) for number in (1, 2, 3)]
    for each, seconds in zip(points, (0.4, 1.0, 7.0), strict=True):
        each.longest_pause = seconds
    table = resume_table(Resume(2, points=points))
    (row,) = table.rows
    shown = dict(zip(table.headers, row, strict=True))
    assert (shown["total"], shown["client, longest pause"]) == ("300 ms", "1,000 ms")
    assert any("client, longest pause: " in remark for remark in table.remarks)


def test_every_block_that_was_put_in_place_counts_as_restored():
    assert restored_blocks([256, 257], recomputed_tokens=0, block_size=128) == 5
    assert restored_blocks([256, 257], recomputed_tokens=2, block_size=128) == 4
    assert restored_blocks([3], recomputed_tokens=9, block_size=128) == 0


def test_a_slow_restore_and_too_much_recomputing_are_said_so():
    said = remarks(point(256), point(4096, restore=0.5, copy=0.1, recomputed=8 * 128 + 8 * 2))
    assert "NOT REACHED: 4096 tokens: 1040 tokens recomputed; less than 1040 were required" in said
    assert "+490 relinking and restoring" in said
    assert "Relinking and restoring alone: 4.90 copies." in said


def test_points_without_replication_are_shown_beside_and_void_ones_are_only_named():
    table = resume_table(Resume(2, points=[point(256), point(256, replicated=False), point(1024, void="it died")]))
    assert [row[:2] for row in table.rows] == [("256", "on"), ("256", "off")]
    assert "1024 tokens, replication on, round 1: void: it died" in table.remarks


def test_what_a_report_has_is_not_measured_again():
    result = Resume(2, points=[point(256), point(1024, void="it died")])
    plan = Plan(Recipe("m"), contexts=(256, 1024), rounds=2)
    assert plan.missing(result, replicated=True) == [(1, 1024), (2, 256), (2, 1024)]
    assert plan.missing(result, replicated=False) == [(1, 256), (1, 1024)]


def test_the_median_round_counts_and_how_far_they_lie_apart_is_shown():
    totals = (0.1, 0.3, 0.2)
    points = [point(256, total=total, number=number) for number, total in enumerate(totals, 1)]
    long = [point(4096, copy=0.1, total=total + 0.15, number=number) for number, total in enumerate(totals, 1)]
    table = resume_table(Resume(2, points=[*long, *points]))
    assert [row[0] for row in table.rows] == ["256", "4096"]
    assert "3: 100 to 300" in table.rows[0]
    assert "worst 1.50: reached" in "\n".join(table.remarks)


def test_every_round_has_to_recompute_little():
    said = remarks(point(256), point(256, number=2), point(256, number=3, recomputed=5_000))
    assert said.count("NOT REACHED: 256 tokens: 5000 tokens recomputed") == 1


def test_the_picture_is_drawn(tmp_path: Path):
    path = tmp_path / "resume.png"
    assert draw_resume(Resume(2, points=[point(256), point(4096), point(256, replicated=False)]), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not draw_resume(Resume(2), tmp_path / "none.png")


def load(number, replicated, speed, tpot, full=1_000, void=None):
    summary = LoadSummary(16, 32, 2048, 20.0, speed, 0.1, 0.2, tpot, tpot, 0.3)
    return CostLoad(number, replicated, summary, 0.01, 100, full, 300, void)


def test_cost_is_judged_within_rounds_and_partial_copies_stand_apart():
    result = ReplicationCost(10.0, [load(1, True, 99, 0.0101), load(1, False, 100, 0.01), load(2, False, 50, 1.0)])
    table = cost_table(result)
    assert table.rows[0][-1] == "0.990 (0.990 to 0.990)"
    said = "\n".join(table.remarks)
    assert "1.000 of its 10 bytes were copied in full blocks, and 0.300 in partly filled ones" in said
    assert said.count(": reached") == 3


def test_a_cost_too_high_is_said_so():
    result = ReplicationCost(10.0, [load(1, True, 90, 0.02, full=1_200), load(1, False, 100, 0.01)])
    assert "\n".join(cost_table(result).remarks).count("NOT REACHED") == 3


def test_memory_is_judged_by_every_look():
    good = StandbyMemory(10.0, 100, 7, 32, [MemorySample(1.0, 90, 5, 7), MemorySample(2.0, 100, 5, 7)])
    assert "\n".join(memory_table(good).remarks).count(": reached") == 2
    bad = StandbyMemory(10.0, 100, 7, 32, [MemorySample(1.0, 101, 5, 6)])
    assert "\n".join(memory_table(bad).remarks).count("NOT REACHED") == 2


def test_empty_results_can_be_shown():
    assert not resume_table(Resume(2)).rows
    assert not cost_table(ReplicationCost()).rows
    assert not memory_table(StandbyMemory(1.0)).rows


PAGE = """\
vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="0",num_gpu_blocks="598"} 1.0
vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="1",num_gpu_blocks="598"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 10.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 5.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 99.0
"""


def test_readings_of_the_metrics_page():
    assert kv_cache(PAGE, engines=2) == (299, 128)
    assert counted(PAGE, "vllm:prompt_tokens") == 15
    with pytest.raises(SystemFailed, match="KV blocks"):
        kv_cache("", engines=2)


def test_readings_of_the_status_document():
    def row(pipeline, standby, size):
        return {
            "pipeline": pipeline, "stage": 1, "standby": standby, "bytes": size, "lag_tokens": 9,
            "full_block_bytes_sent": 2, "partial_block_bytes_sent": 3,
        }  # fmt: skip

    status = {"replication": [row(0, "a", 10), row(1, "a", 20), row(2, None, 99)]}
    assert sent(status) == Sent(6, 9)
    assert fullest_standby(status) == 30
    assert (lag_tokens(status, 0, 1), lag_tokens(status, 2, 1), lag_tokens(status, 0, 0)) == (9, None, None)


def test_a_plain_copy_takes_time_in_proportion():
    assert 0 < copy_seconds(1 << 20, 2) < copy_seconds(1 << 20, 64)
