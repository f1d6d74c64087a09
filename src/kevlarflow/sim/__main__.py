"""``python -m kevlarflow.sim``: many seeds, one seed, or a journal. ``make sim`` runs it."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys

import msgspec

from kevlarflow.command_line import Parser, amount, count
from kevlarflow.errors import UsageError
from kevlarflow.recovery.invariants import Violated
from kevlarflow.sim.many import Outcome, run_many
from kevlarflow.sim.replay import replay
from kevlarflow.sim.shrink import failure_of, shrink, story_of

PROGRAM = "python -m kevlarflow.sim"
SEEDS = 20_000
STORY_LINES = 80
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run it. Returns 0 when every invariant held."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.seed is not None and options.alone:
        parser.error(f"--seed tells the story of a fleet: repeat one alone by --alone --seeds {_only(options.seed)}")
    if options.journal:
        return _replay(options.journal)
    if options.seed is not None:
        return _one(options.seed, frozenset(filter(None, options.without.split(","))), options.lines)
    outcome = run_many(options.seeds, options.jobs, seconds=options.seconds, quiet=options.quiet, alone=options.alone)
    _summarize(outcome)
    if outcome.failed is None:
        return 0
    print(f"seed {outcome.failed}: {outcome.error}")
    if options.alone:
        print(f"\nRepeat it: python -m kevlarflow.sim --alone --seeds {_only(outcome.failed)}")
    if options.quiet or options.alone:
        return 1
    print("making it smaller ...", flush=True)
    without = shrink(outcome.failed)
    print(story_of(outcome.failed, without, options.lines))
    print(f"\nRepeat it: {_command(outcome.failed, without)}")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Run many seeds, one seed, or a journal.")
    parser.add_argument("--seeds", type=_seeds, default=str(SEEDS), help="how many, or FIRST:END (default %(default)s)")
    parser.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--seconds", type=amount, default=float("inf"), help="begin no more seeds after this time")
    parser.add_argument("--alone", action="store_true", help="a pipeline core alone, anything in any order")
    parser.add_argument("--quiet", action="store_true", help="no progress, and no story of a seed that fails")
    parser.add_argument("--seed", type=int, help="run this seed alone, and tell its story if it fails")
    parser.add_argument("--without", default="", help="leave these faults, requests and nodes out: f0,r2,p3")
    parser.add_argument("--lines", type=int, default=STORY_LINES, help="lines of a story (default %(default)s)")
    parser.add_argument("--journal", nargs="+", help="replay what a controller wrote down, oldest file first")
    return parser


def _seeds(text: str) -> range:
    first, _, end = text.partition(":")
    with contextlib.suppress(ValueError):
        seeds = range(int(first), int(end)) if end else range(int(first))
        if seeds:
            return seeds
    raise argparse.ArgumentTypeError(f"{text} names no seeds: use a number of 1 or more, or FIRST:END")


def _only(seed: int) -> str:
    return f"{seed}:{seed + 1}"


def _one(seed: int, without: frozenset[str], lines: int) -> int:
    error = failure_of(seed, without)
    if error is None:
        print(f"seed {seed}: every invariant held")
        return 0
    if not without:
        without = shrink(seed)
    print(story_of(seed, without, lines))
    print(f"\nRepeat it: {_command(seed, without)}")
    return 1


def _command(seed: int, without: frozenset[str]) -> str:
    rest = f" --without {','.join(sorted(without))}" if without else ""
    return f"python -m kevlarflow.sim --seed {seed}{rest}"


def _summarize(outcome: Outcome) -> None:
    rate = outcome.seeds / max(outcome.seconds, 0.001)
    print(f"{outcome.seeds:,} schedules in {outcome.seconds:.0f} s, {rate:.0f} a second")
    print(", ".join(f"{count:,} {what}" for what, count in sorted(outcome.counts.items())))


def _replay(paths: list[str]) -> int:
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb")) for path in paths]
            for line in replay(itertools.chain(*files)):
                print(line)
    except OSError as error:
        print(f"{PROGRAM}: {error.filename} cannot be read: {error.strerror}", file=sys.stderr)
        return 1
    except (UsageError, msgspec.MsgspecError) as error:
        print(f"{PROGRAM}: {' '.join(paths)} is no journal of a controller: {error}", file=sys.stderr)
        return 1
    except Violated as error:
        print(f"{PROGRAM}: an invariant did not hold: {error}", file=sys.stderr)
        return 1
    print("every invariant held")
    return 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of a set of words would differ from run to run.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONHASHSEED": "0"})
    sys.exit(main())
