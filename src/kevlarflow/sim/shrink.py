"""Makes a failing run smaller: what can be left out of its plan without changing what goes wrong is left out."""

from __future__ import annotations

from kevlarflow.sim import fleet, plan

MAX_RUNS = 400


def failure_of(seed: int, without: frozenset[str] = frozenset()) -> Exception | None:
    """What goes wrong in a run, or None. Whatever the real code raises is a failure as well."""
    try:
        fleet.run(plan.draw(seed, without))
    except Exception as error:
        return error
    return None


def shrink(seed: int) -> frozenset[str]:
    """Names of the faults, requests, pipelines and stages without which the seed still fails in the same way."""
    kind = type(failure_of(seed))
    without: frozenset[str] = frozenset()
    runs = 0
    smaller = True
    while smaller and runs < MAX_RUNS:
        smaller = False
        for part in plan.draw(seed, without).parts:
            runs += 1
            if part not in without and type(failure_of(seed, without | {part})) is kind:
                without |= {part}
                smaller = True
    return without


def story_of(seed: int, without: frozenset[str], lines: int) -> str:
    """What happened in a failing run, the last `lines` of it, and what is wrong."""
    run = fleet.Fleet(plan.draw(seed, without), telling=True)
    try:
        run.run()
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    else:
        wrong = "nothing is wrong"
    told = [f"... {len(run.log) - lines} lines before"] if len(run.log) > lines else []
    return "\n".join([str(run.plan.shape), *told, *run.log[-lines:], wrong])
