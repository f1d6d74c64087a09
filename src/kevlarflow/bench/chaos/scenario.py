"""A scenario: which cluster, which load, which faults at which moments, and what has to hold. Read from YAML.

Everything that can be wrong with the file is found here, and told with the line and the key it stands at, before any
process is started.
"""

from __future__ import annotations

import enum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta

from kevlarflow.bench.chaos.complaints import complaint
from kevlarflow.errors import UsageError

Count = Annotated[int, Meta(ge=1)]
Index = Annotated[int, Meta(ge=0)]
LONGEST_SECONDS = 86_400.0
Seconds = Annotated[float, Meta(ge=0, le=LONGEST_SECONDS)]
Share = Annotated[float, Meta(gt=0, lt=1)]

SHIPPED = resources.files("kevlarflow.bench.chaos") / "scenarios"


class Role(enum.StrEnum):
    """What a target is to its pipeline's stage when the fault strikes."""

    NODE = "node"
    """Whoever serves the stage."""
    DONOR = "donor"
    """Whoever serves the stage in place of its own node."""
    STANDBY = "standby"
    """Whoever keeps the copies of its KV."""
    REPLACEMENT = "replacement"
    """The node that is to take the stage back."""
    ENGINE = "engine"
    CONTROLLER = "controller"
    API = "api"

    @property
    def is_node(self) -> bool:
        """Whether it is a node's."""
        return self in {Role.NODE, Role.DONOR, Role.STANDBY, Role.REPLACEMENT}


class Phase(enum.StrEnum):
    """What the status shows of a pipeline's stage."""

    RECOVERING = "recovering"
    """The pipeline is being put together again."""
    WAITING = "waiting"
    """A stage of it has no node."""
    BORROWED = "borrowed"
    """Another pipeline's node serves the stage."""
    LOADING = "loading"
    """The replacement loads its weights."""
    MOVING = "moving"
    """The stage goes back to its replacement."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a scenario: a key that nobody knows is an error."""


class Cluster(Part, frozen=True, kw_only=True):
    """How the cluster is started; float32, so that texts can be compared letter by letter."""

    model: str | None = None
    stages: Count = 2
    pipelines: Count = 2
    eager: bool = True
    dtype: str = "float32"
    max_model_len: Count = 1024
    max_num_batched_tokens: Count = 256
    """Small steps: with vLLM's own 2,048 a slow machine is silent for seconds while it computes prompts."""
    kv_cache_memory_bytes: Count = 128 * 2**20
    flags: tuple[str, ...] = ()
    """Further flags of `kevlarflow serve`."""


class Kind(enum.StrEnum):
    """Kinds of requests."""

    GREEDY = "greedy"
    SEEDED = "seeded"
    JSON = "json"
    LOGPROBS = "logprobs"
    LONG = "long"
    CANCELLED = "cancelled"
    """The client hangs up after a third of the tokens."""


class Load(Part, frozen=True, kw_only=True):
    """What runs while the faults strike: clients that each send one request after the other."""

    streams: Count = 16
    """Clients at a time."""
    requests: Count = 1
    """Of each client."""
    tokens: Annotated[int, Meta(ge=8)] = 96
    """Output tokens of a request, at most."""
    stay: bool = False
    """Each client sends all its requests to one pipeline, instead of to all in turn."""
    kinds: Annotated[tuple[Kind, ...], Meta(min_length=1)] = tuple(Kind)


class Aim(Part, frozen=True, kw_only=True):
    """Whom a fault is for."""

    role: Role = Role.NODE
    pipeline: Index = 0
    stage: Index = 0


class Moment(Part, frozen=True, kw_only=True):
    """When a fault strikes: one of the three."""

    seconds: Seconds | None = None
    """After the load has begun."""
    tokens: Count | None = None
    """When so many tokens of all streams together have arrived."""
    phase: Phase | None = None
    """When the status shows the target's pipeline and stage in it."""

    def __post_init__(self) -> None:
        """Exactly one has to be given."""
        if sum(each is not None for each in (self.seconds, self.tokens, self.phase)) != 1:
            raise ValueError("Expected exactly one of `seconds`, `tokens` and `phase`")


class Fault(Part, frozen=True, kw_only=True, tag_field="kind"):
    """Base of the kinds of faults."""

    at: Moment
    target: Aim = Aim()


class Crash(Fault, frozen=True, kw_only=True, tag="crash"):
    """SIGKILL."""


class Stop(Fault, frozen=True, kw_only=True, tag="stop"):
    """SIGSTOP, and SIGCONT after a while if one is given."""

    thaw_after_seconds: Seconds | None = None
    lost: bool = False
    """It stands still for longer than is believed in: the cluster has to give the node up all the same."""


class Slow(Fault, frozen=True, kw_only=True, tag="slow"):
    """It may run for a share of the time only."""

    seconds: Seconds
    """For how long, at most: it ends when the node leaves."""
    share: Share = 0.5
    period_seconds: Annotated[float, Meta(gt=0, le=LONGEST_SECONDS)] = 0.1
    """The part in which it stands still has to be shorter than `stopped_after_ms`, or it counts as stopped."""

    def __post_init__(self) -> None:
        """What does not last for a period cannot be proved."""
        if self.seconds < self.period_seconds:
            raise ValueError("Expected at least one `period_seconds` in `seconds`")


class Cut(Fault, frozen=True, kw_only=True, tag="cut"):
    """Its connections break, again and again."""

    seconds: Seconds
    """For how long."""


AnyFault = Crash | Stop | Slow | Cut


class Checks(Part, frozen=True, kw_only=True):
    """What has to hold. Limits are included; what is absent is not checked."""

    lost_requests: Index | None = 0
    identical: bool = True
    """Each text is the one of the same run without faults, token by token; logprobs are, to a thousandth."""
    largest_gap_seconds: Seconds | None = None
    """Of the waits between two tokens of a stream, from the first fault on."""
    detected_seconds: Seconds | None = None
    """From each crash or stop of a node to the cluster's decision that it is lost."""
    moved_seconds: Seconds | None = None
    """From the moment at which a node becomes slow until the last of its lanes has moved to another node, planned."""
    lane_back_seconds: Seconds | None = None
    """From the last fault until every node is there and serves its own lane."""
    unexpected_losses: Index | None = 0
    """Lanes of nodes that the cluster gave up though no fault had ended them."""
    left_behind: Index | None = 0
    """Processes, folders and shared memory that outlive the cluster."""


class Scenario(Part, frozen=True, kw_only=True):
    """One experiment."""

    about: str
    """One line for people."""
    cluster: Cluster = Cluster()
    load: Load = Load()
    faults: Annotated[tuple[AnyFault, ...], Meta(min_length=1)]
    checks: Checks = Checks()


def shipped() -> list[str]:
    """Names of the scenarios that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def load(name: str, *, starts_cluster: bool = True) -> Scenario:
    """The scenario in a file, or a shipped one by its name. Raises `UsageError` in one line."""
    plain = name.removesuffix(".yaml")
    try:
        if plain in shipped() and not Path(name).is_file():
            return parse((SHIPPED / f"{plain}.yaml").read_text(), name, starts_cluster=starts_cluster)
        return parse(Path(name).read_text(), name, starts_cluster=starts_cluster)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"{name} cannot be read ({reason}): name a file, or one of {', '.join(shipped())}") from error


def parse(text: str, source: str, *, starts_cluster: bool = True) -> Scenario:
    """The scenario in a text; `source` is what to call it in errors. Raises `UsageError` with line and key.

    For a cluster that runs already, `require_places` is to be asked when it is known how large that is.
    """
    root, data = _read(text, source)
    if root is None:
        raise UsageError(f"{source}: the file is empty")
    try:
        scenario: Scenario = msgspec.convert(data, Scenario)
    except msgspec.ValidationError as error:
        raise UsageError(complaint(source, root, Scenario, str(error))) from error
    if starts_cluster:
        require_places(scenario, source, scenario.cluster.pipelines, scenario.cluster.stages)
    _require_moments(scenario, source)
    return scenario


def _read(text: str, source: str) -> tuple[yaml.Node | None, Any]:
    """A text as YAML's nodes, which know their lines, and as data."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        _require_single_keys(root, source)
        return root, yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{source}{line}: this is not YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise UsageError(f"{source}: something in it contains itself, or is nested too deeply") from error
    except ValueError as error:
        # YAML takes some words for dates and numbers that there are not.
        raise UsageError(f"{source}: a value cannot be read ({error}): put it in quotes") from error


def _require_single_keys(node: yaml.Node | None, source: str) -> None:
    """YAML itself takes the last of several values of a key."""
    seen: set[str] = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{source}, line {key.start_mark.line + 1}: a key has to be a word")
        if key.value in seen:
            raise UsageError(f"{source}, line {key.start_mark.line + 1}: {key.value} is given a second time")
        seen.add(key.value)
        _require_single_keys(value, source)
    for value in node.value if isinstance(node, yaml.SequenceNode) else ():
        _require_single_keys(value, source)


def require_places(scenario: Scenario, source: str, pipelines: int, stages: int) -> None:
    """Raise `UsageError` unless a cluster of this size has everything that the faults are for."""
    for number, fault in enumerate(scenario.faults):
        aim = fault.target
        if aim.pipeline >= pipelines or aim.stage >= stages:
            place = f"pipeline {aim.pipeline}, stage {aim.stage}"
            size = f"{pipelines} pipelines of {stages} stages"
            raise UsageError(f"{source}: faults[{number}].target: there is no {place} in {size}")
        if aim.role in {Role.DONOR, Role.STANDBY} and pipelines == 1:
            raise UsageError(f"{source}: faults[{number}].target: a single pipeline has no {aim.role}")


def _require_moments(scenario: Scenario, source: str) -> None:
    most = scenario.load.streams * scenario.load.requests * scenario.load.tokens
    for number, fault in enumerate(scenario.faults):
        if fault.at.tokens is not None and fault.at.tokens > most:
            what = f"{fault.at.tokens} tokens never come, for the load has {most} at most"
            raise UsageError(f"{source}: faults[{number}].at.tokens: {what}")


def as_data(scenario: Scenario) -> Any:
    """The scenario as plain data, for JSON."""
    return msgspec.to_builtins(scenario)
