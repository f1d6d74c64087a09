"""The status document: the contract of `kevlarflow status --json`, made from the cluster's state and nothing else."""

from __future__ import annotations

from typing import Any

from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.events import Recovery
from kevlarflow.recovery.formation import stages_without_candidates
from kevlarflow.recovery.members import Pipeline, Slot
from kevlarflow.recovery.waiting import seconds_left
from kevlarflow.types import PHASES, NodeState, PipelineState


def status_document(cluster: Cluster, main_pid: int) -> dict[str, Any]:
    """The document, ready to be written as JSON. `main_pid` is the process that the user started."""
    return {
        "model": cluster.config.served_model_name,
        "main_pid": main_pid,
        "pipelines": [_pipeline(cluster, each) for each in cluster.pipelines],
        "engines": [_engine(each) for each in cluster.pipelines],
        "nodes": [_node(cluster, slot) for slot in cluster.slots.values()],
        "replication": replication_rows(cluster),
        "recoveries": [_recovery(each) for each in cluster.recoveries],
    }


def _pipeline(cluster: Cluster, pipeline: Pipeline) -> dict[str, Any]:
    waiting_for = None
    if pipeline.state is PipelineState.WAITING:
        stages = stages_without_candidates(cluster, pipeline)
        waiting_for = {"stages": stages, "seconds_left": seconds_left(cluster, pipeline)}
    return {
        "id": pipeline.id,
        "state": str(pipeline.state),
        "epoch": pipeline.epoch,
        "nodes": [member.node if member is not None else None for member in pipeline.members],
        "waiting_for": waiting_for,
    }


def _engine(pipeline: Pipeline) -> dict[str, Any]:
    engine = pipeline.engine
    report = engine.report
    return {
        "id": f"engine-{pipeline.id}",
        "pid": engine.pid,
        "pipeline": pipeline.id,
        "state": str(engine.state),
        "running": report.running if report else 0,
        "waiting": report.waiting if report else 0,
        "kv_blocks": engine.kv_blocks,
    }


def replication_rows(cluster: Cluster) -> list[dict[str, Any]]:
    """A row for each lane that is replicated, or could be."""
    return [row for pipeline in cluster.pipelines for row in _replication(pipeline)]


def _replication(pipeline: Pipeline) -> list[dict[str, Any]]:
    report = pipeline.engine.report
    return [
        {
            "pipeline": pipeline.id,
            "stage": lane.stage,
            "standby": lane.standby.node if lane.standby is not None else None,
            "lag_tokens": lane.live_tokens - lane.covered_tokens,
            "bytes": lane.used_bytes,
            "limit_bytes": lane.limit_bytes,
            "coverage": lane.covered_tokens / lane.live_tokens if lane.live_tokens else 1.0,
            "full_block_bytes_sent": lane.full_bytes,
            "partial_block_bytes_sent": lane.partial_bytes,
            "dropped": lane.dropped,
            "refused": lane.refused,
        }
        for lane in (report.replication if report else ())
    ]


def _node(cluster: Cluster, slot: Slot) -> dict[str, Any]:
    """A dead node is shown until the process that replaces it exists."""
    unborn = slot.state is NodeState.STARTING and not slot.pids and slot.incarnation > 1
    return {
        "id": slot.node,
        "incarnation": slot.incarnation - 1 if unborn else slot.incarnation,
        "pid": slot.pids[0] if slot.pids else None,
        "pids": list(slot.pids),
        "host": slot.host,
        "stage": slot.stage,
        "state": str(NodeState.DEAD if unborn else slot.state),
        "lanes": [each.id for each in cluster.pipelines if slot.member in each.members],
    }


def _recovery(recovery: Recovery) -> dict[str, Any]:
    return {
        "id": recovery.id,
        "state": str(recovery.state),
        "time": recovery.time,
        "pipeline": recovery.pipeline,
        "stage": recovery.stage,
        "cause": str(recovery.cause),
        "from": recovery.origin,
        "to": recovery.target,
        "requests": recovery.requests,
        "lost_requests": recovery.lost_requests,
        "recomputed_tokens": recovery.recomputed_tokens,
        "seconds": {phase: getattr(recovery.seconds, phase) for phase in PHASES},
    }
