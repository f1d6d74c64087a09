"""What stock vLLM answers: its own server, one process for the model, no pipeline.

No chunk, no prefix cache, no preemption: nothing that has to be recomputed or rebuilt. (A seeded request whose
prefill is chunked fails on stock vLLM's CPU build, so the reference could not be chunked anyway.)

Producing it takes a minute, so it is kept on disk under the hash of everything that it depends on. A second pass with
two logprobs a token finds how close the two best tokens were: what `compare` excuses, and only there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock

from kevlarflow.bench.systems import free_port
from kevlarflow.default_model import MANIFEST_NAME, default_cache_dir, ensure_default_model
from parity.client import Recording, in_lanes, replay
from parity.transcript import transcribe
from parity.workload import CHAT, MODEL, Request

FORMAT_VERSION = 1
"""Grows when recordings change their form, so that older references are made again."""
START_TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.2
LANES = 6
"""Requests that are asked at a time; the margins show that no answer hangs on the batch."""
FLAGS = (
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=2048",
    "--max-num-batched-tokens=4096",
    "--max-num-seqs=32",
    "--no-enable-chunked-prefill",
    "--no-enable-prefix-caching",
    "--block-size=32",
    "--kv-cache-memory-bytes=536870912",
    "--pipeline-parallel-size=1",
    "--seed=0",
)
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Stock vLLM's answers to a workload."""

    recordings: dict[str, Recording]
    margins: dict[str, list[float]]
    """For each greedy request: how far the best token was ahead of the second best, at each position."""


def reference(requests: Sequence[Request]) -> Reference:
    """The reference of a workload, from the disk if this machine has made it before."""
    place = default_cache_dir() / "parity" / f"{fingerprint(requests)}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            draft = place.with_suffix(".draft")
            draft.write_text(json.dumps(_produce(requests)))
            draft.rename(place)
        data = json.loads(place.read_text())
    recordings = {name: Recording.from_json(entry) for name, entry in data["recordings"].items()}
    return Reference(recordings, data["margins"])


def fingerprint(requests: Sequence[Request]) -> str:
    """Names a reference: changes with whatever could change an answer."""
    depends_on = {
        "format": FORMAT_VERSION,
        "requests": [[request.name, request.path, request.body] for request in requests],
        "vllm": importlib.metadata.version("vllm-cpu"),
        "torch": importlib.metadata.version("torch"),
        "model": (ensure_default_model() / MANIFEST_NAME).read_text(),
        "flags": FLAGS,
        "machine": [platform.machine(), _processor()],
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:20]


@contextmanager
def stock_server(flags: Sequence[str] = FLAGS) -> Iterator[str]:
    """A stock vLLM server while the block runs; gives its base URL."""
    port = free_port()
    command = [
        sys.executable,
        *("-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(ensure_default_model()), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), *flags),
    ]
    log = default_cache_dir() / "parity" / f"stock-{port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        try:
            base_url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(base_url, process, log)
            yield base_url
        finally:
            _stop(process)
    log.unlink()


def _wait_until_healthy(base_url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"stock vLLM ended with {process.returncode} before it was ready:\n{tail}")
        try:
            if httpx.get(f"{base_url}/health", timeout=5.0).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"stock vLLM was not ready after {START_TIMEOUT_SECONDS:.0f} s, see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    # Its engine lives in the same session; whatever is left of that goes too.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _produce(requests: Sequence[Request]) -> dict[str, Any]:
    with stock_server() as base_url:
        recordings = replay(base_url, in_lanes(requests, LANES))
        for recording in recordings.values():
            if recording.failure or recording.status != httpx.codes.OK:
                raise RuntimeError(f"stock vLLM failed on {recording.name}: {recording.failure or recording.events}")
        margins = _margins(base_url, requests)
    return {
        "recordings": {name: recording.to_json() for name, recording in recordings.items()},
        "margins": margins,
    }


def _margins(base_url: str, requests: Sequence[Request]) -> dict[str, list[float]]:
    greedy = [_with_two_logprobs(request) for request in requests if request.greedy]
    recordings = replay(base_url, in_lanes(greedy, LANES))
    return {
        name: [_margin(entry["top"]) for entry in transcribe(recording).choices[0].logprobs]
        for name, recording in recordings.items()
    }


def _with_two_logprobs(request: Request) -> Request:
    extra = {"logprobs": True, "top_logprobs": 2} if request.path == CHAT else {"logprobs": 2, "echo": False}
    body = {**request.body, **extra, "return_tokens_as_token_ids": True}
    return dataclasses.replace(request, body=body)


def _margin(alternatives: dict[str, float]) -> float:
    best, second = sorted(alternatives.values(), reverse=True)[:2]
    return best - second


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
