"""What a cluster that starts is waiting for, in one line for the person who waits.

The supervisor says it whenever nothing else has been said for a while. It knows whether the model is checked; the rest
is in the status document of the controller.
"""

from __future__ import annotations

from typing import Any

from kevlarflow.config import ServeConfig
from kevlarflow.types import EngineState, NodeState, PipelineState

EAGER = frozenset({"--enforce-eager", "--enforce_eager"})
COMPILING = " (compiling takes a minute or two the first time)"


def awaited(config: ServeConfig, status: dict[str, Any] | None, *, model_is_checked: bool) -> str:
    """The line. `status` is the newest status document, or None while the controller has not answered."""
    if not model_is_checked:
        return "waiting for vLLM: it is being imported, then it checks flags and model"
    if status is None:
        return "waiting for the controller: it has not answered yet"
    missing = [
        *_missing("nodes", status["nodes"], NodeState.READY, "" if EAGER & set(config.vllm_args) else COMPILING),
        *_missing("engines", status["engines"], EngineState.READY),
        *_missing("pipelines", status["pipelines"], PipelineState.SERVING),
    ]
    return f"waiting for {', '.join(missing) or 'the API server: it does not answer yet'}"


def _missing(what: str, found: list[dict[str, Any]], wanted: str, note: str = "") -> list[str]:
    """How many of one kind are there, unless it is all of them."""
    there = sum(each["state"] == wanted for each in found)
    return [f"{what}: {there} of {len(found)} {wanted}{note}"] if there < len(found) else []
