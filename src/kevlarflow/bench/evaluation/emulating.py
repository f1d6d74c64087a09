"""How a system under test is made to emulate: an environment, and an entry point that vLLM itself finds.

Stock vLLM and KevlarFlow get the same: a folder on their path that names `kevlarflow.node.emulated:install` as one of
`vllm.general_plugins`, the profile, and the folder in which each process counts its steps.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

import kevlarflow
from kevlarflow.emulation.profile import (
    LONGEST_OVERRUN_SHARE,
    REPORTS_VARIABLE,
    VARIABLE,
    Profile,
    StepCounts,
)

METADATA = "Metadata-Version: 2.1\nName: kevlarflow-emulation\nVersion: 1\n"
ENTRY_POINT = "[vllm.general_plugins]\nkevlarflow-emulation = kevlarflow.node.emulated:install\n"


def emulation(profile: Profile, folder: Path) -> dict[str, str]:
    """The environment of a system that emulates `profile`; writes what it needs into `folder`."""
    plugin, reports = folder / "plugin", _reports(folder)
    metadata = plugin / "kevlarflow_emulation-1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    reports.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(METADATA)
    (metadata / "entry_points.txt").write_text(ENTRY_POINT)
    ours = str(Path(kevlarflow.__file__).parents[1])
    path = os.pathsep.join(filter(None, (str(plugin), ours, os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, VARIABLE: msgspec.json.encode(profile).decode(), REPORTS_VARIABLE: str(reports)}


def step_counts(folder: Path) -> list[StepCounts]:
    """What every process that emulated has counted, dead ones included."""
    return [msgspec.json.decode(path.read_bytes(), type=StepCounts) for path in sorted(_reports(folder).glob("*.json"))]


def step_complaint(counts: list[StepCounts], stages: int) -> str | None:
    """Why the cell does not count: a stage did not emulate, or too many steps overran; None when all is well."""
    idle = set(range(stages)) - {each.stage for each in counts if each.steps}
    if idle:
        return f"no step of stage {min(idle)} took its emulated time: see the logs"
    steps, late = sum(each.steps for each in counts), sum(each.overruns for each in counts)
    if late <= LONGEST_OVERRUN_SHARE * steps:
        return None
    worst = max(counts, key=lambda each: each.overruns)
    return (
        f"{late} of {steps} steps overran their emulated time, more than {LONGEST_OVERRUN_SHARE:.0%}; "
        f"most of them, {worst.overruns}, in process {worst.pid} of stage {worst.stage}"
    )


def _reports(folder: Path) -> Path:
    return folder / "steps"
