"""How long a stage takes on the emulated device: a roofline over published figures.

For a step of n tokens in all, whose requests have c tokens of context each, on one of S stages::

    memory   = (weight bytes + KV bytes of a token x sum of c) / (memory bandwidth x its efficiency)
    compute  = (2 x parameters x n + 4 x layers x hidden size x sum of n_i x c_i) / (FLOP/s x their efficiency)
    stage    = max(memory, compute) + overhead
    sampling = the same for the output head, on the last stage, for one token of each request
    link     = latency + n x activation bytes of a token / link bandwidth, before each stage but the first

Sources: the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009); NVIDIA's A10 data sheet (600 GB/s, 125
TFLOP/s dense in bf16, 24 GB); the published configuration of Llama-3.1-8B (32 layers, hidden size 4096, MLP 14336, 8 KV
heads of 128, vocabulary 128256). The efficiencies (0.8 of the bandwidth, 0.5 of the FLOP/s) and the overhead of 1 ms a
step are assumptions, the same for every system.

The link is not overlapped with the stage that waits for it: so does a receive on the stream that computes.
"""

from __future__ import annotations

import os

import msgspec

from kevlarflow.errors import UsageError

VARIABLE = "KEVLARFLOW_EMULATION"
"""Environment variable with a `Profile` as JSON: a process emulates exactly when it is there."""
REPORTS_VARIABLE = "KEVLARFLOW_EMULATION_REPORTS"
"""Environment variable with the folder in which each process keeps a `StepCounts` as JSON."""
LATE_SHARE = 0.1
"""A step is an overrun when it took so much longer than it should have, as a share of its emulated time."""
LONGEST_OVERRUN_SHARE = 0.01
"""With more overruns than this share of its steps a cell is void."""
MOST_MOMENTS = 1000
GIGABIT = 1_000_000_000


class Model(msgspec.Struct, frozen=True):
    """The emulated model. Defaults: Llama-3.1-8B."""

    layers: int = 32
    hidden_size: int = 4096
    intermediate_size: int = 14336
    query_heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    vocabulary: int = 128_256
    bytes_per_value: int = 2
    """bf16."""

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer; its two norms are too small to count."""
        attention = self.hidden_size * self.head_size * 2 * (self.query_heads + self.kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.bytes_per_value


class Device(msgspec.Struct, frozen=True):
    """The emulated device. Defaults: NVIDIA A10."""

    name: str = "A10"
    memory_bytes_per_second: float = 600e9
    memory_efficiency: float = 0.8
    flops: float = 125e12
    compute_efficiency: float = 0.5
    overhead_seconds: float = 1e-3


class Profile(msgspec.Struct, frozen=True):
    """An emulated cluster."""

    stages: int = 4
    link_bits_per_second: int = GIGABIT
    link_latency_seconds: float = 5e-5
    activation_tensors: int = 2
    """vLLM's Llama sends the hidden states and the residual."""
    slowdown: float = 1.0
    """Every emulated time is multiplied by this."""
    model: Model = Model()
    device: Device = Device()

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one stage."""
        return self.model.kv_bytes_per_token // self.stages

    def stage_seconds(self, tokens: int, context_tokens: int, pairs: float) -> float:
        """Time of one stage's layers.

        `tokens` of all requests in the step, `context_tokens` the sum of their contexts, `pairs` the sum of new tokens
        times context over the requests.
        """
        layers = self.model.layers / self.stages
        parameters = layers * self.model.layer_parameters
        read = parameters * self.model.bytes_per_value + self.kv_bytes_per_token * context_tokens
        flops = 2 * parameters * tokens + 4 * layers * self.model.hidden_size * pairs
        return self._roofline(read, flops) + self.slowdown * self.device.overhead_seconds

    def sampling_seconds(self, requests: int) -> float:
        """Time of the output head on the last stage."""
        parameters = self.model.hidden_size * self.model.vocabulary
        return self._roofline(parameters * self.model.bytes_per_value, 2.0 * parameters * requests)

    def transfer_seconds(self, tokens: int) -> float:
        """Time of a step's activations on a link."""
        per_token = self.activation_tensors * self.model.hidden_size * self.model.bytes_per_value
        return self.slowdown * (self.link_latency_seconds + tokens * per_token * 8 / self.link_bits_per_second)

    def _roofline(self, read_bytes: float, flops: float) -> float:
        memory = read_bytes / (self.device.memory_bytes_per_second * self.device.memory_efficiency)
        compute = flops / (self.device.flops * self.device.compute_efficiency)
        return self.slowdown * max(memory, compute)


class StepCounts(msgspec.Struct):
    """What one process says of the steps that it has emulated."""

    pid: int
    stage: int
    steps: int = 0
    overruns: int = 0
    emulated_seconds: float = 0.0
    late_seconds: float = 0.0
    """Sum over all steps of what they took too long."""
    host_seconds: float = 0.0
    """What the real forwards took, sleeping left out."""
    overruns_at: list[float] = []
    """When the first `MOST_MOMENTS` overruns ended, by `time.monotonic()`."""

    def add(self, emulated_seconds: float, host_seconds: float, took_seconds: float, now: float) -> None:
        """A step has been done, at `now` by `time.monotonic()`."""
        self.steps += 1
        if took_seconds > emulated_seconds * (1 + LATE_SHARE):
            self.overruns += 1
            if len(self.overruns_at) < MOST_MOMENTS:
                self.overruns_at.append(now)
        self.emulated_seconds += emulated_seconds
        self.late_seconds += max(0.0, took_seconds - emulated_seconds)
        self.host_seconds += host_seconds


def from_environment() -> Profile | None:
    """The profile that this process emulates; None without the variable. Raises `UsageError` when it is no profile."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=Profile)
    except msgspec.DecodeError as error:
        raise UsageError(f"{VARIABLE} is no emulation profile ({error}): unset it") from error
