"""The controller's metrics, in Prometheus' conventions, as one text that the API server appends to its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.status import replication_rows
from kevlarflow.types import PHASES, NodeState, PipelineState

BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counts what ended, and looks at the rest when asked."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._recoveries = Counter(
            "kevlarflow_recoveries", "Recoveries that ended.", ["cause", "state"], registry=self._registry
        )
        self._seconds = Histogram(
            "kevlarflow_recovery_seconds",
            "Duration of each phase of the recoveries that succeeded.",
            ["phase"],
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._recomputed = Counter(
            "kevlarflow_recomputed_tokens", "Tokens computed again in recoveries.", registry=self._registry
        )
        self._lost = Counter("kevlarflow_lost_requests", "Requests that could not be saved.", registry=self._registry)
        self._nodes = Gauge("kevlarflow_nodes", "Nodes by state.", ["state"], registry=self._registry)
        self._pipelines = Gauge("kevlarflow_pipelines", "Pipelines by state.", ["state"], registry=self._registry)
        self._epoch = Gauge(
            "kevlarflow_pipeline_epoch", "Newest epoch of a pipeline.", ["pipeline"], registry=self._registry
        )
        lane = ["pipeline", "stage"]
        self._replication = {
            "lag_tokens": Gauge(
                "kevlarflow_replication_lag_tokens", "Live tokens not on the standby.", lane, registry=self._registry
            ),
            "bytes": Gauge("kevlarflow_replication_standby_bytes", "A lane's replicas.", lane, registry=self._registry),
            "coverage": Gauge(
                "kevlarflow_replication_coverage_ratio", "Live KV on the standby.", lane, registry=self._registry
            ),
        }
        self._dropped = Gauge(
            "kevlarflow_control_dropped_messages",
            "Control messages that could not be decoded or delivered.",
            registry=self._registry,
        )
        self._journal_lost = Gauge(
            "kevlarflow_journal_lost_lines", "Lines the disk did not take.", registry=self._registry
        )

    def observe(self, cluster: Cluster) -> None:
        """Count recoveries that have ended since the last call."""
        counted: set[tuple[int, int]] = set()
        while cluster.ended:
            recovery = cluster.ended.popleft()
            self._recoveries.labels(recovery.cause, recovery.state).inc()
            if recovery.state != "done":
                continue
            for phase in PHASES:
                self._seconds.labels(phase).observe(getattr(recovery.seconds, phase))
            # Stages that came back together share their requests and tokens.
            together = (recovery.pipeline, round(1_000 * (recovery.formed_at or 0.0)))
            if together not in counted:
                counted.add(together)
                self._recomputed.inc(recovery.recomputed_tokens)
                self._lost.inc(recovery.lost_requests)

    def render(self, cluster: Cluster, dropped: int, journal_lost: int) -> bytes:
        """The text."""
        self.observe(cluster)
        for node_state in NodeState:
            count = sum(slot.state is node_state for slot in cluster.slots.values())
            self._nodes.labels(node_state).set(count)
        for state in PipelineState:
            self._pipelines.labels(state).set(sum(each.state is state for each in cluster.pipelines))
        for pipeline in cluster.pipelines:
            self._epoch.labels(str(pipeline.id)).set(pipeline.epoch)
        for row in replication_rows(cluster):
            for name, gauge in self._replication.items():
                gauge.labels(str(row["pipeline"]), str(row["stage"])).set(row[name])
        self._dropped.set(dropped)
        self._journal_lost.set(journal_lost)
        return generate_latest(self._registry)
