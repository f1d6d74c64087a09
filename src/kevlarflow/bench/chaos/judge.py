"""Judgement: pure functions from what was observed to what holds. No clock, no cluster.

A check that could not be observed has not held: it says so instead of passing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from kevlarflow.bench.chaos.load import Answer
from kevlarflow.bench.chaos.scenario import Checks
from kevlarflow.bench.streams import Tokens

LOGPROB_TOLERANCE = 1e-3
"""What is computed again, or beside other requests, is summed in another order."""
UNEXPECTED = "unexpected losses"


class Happened(msgspec.Struct):
    """A fault that was verified."""

    name: str
    """What was done to whom."""
    at: float
    """`time.monotonic()` of the first signal."""
    proof: str
    """How it was seen to have happened."""
    is_to_be_detected: bool = False
    detected_seconds: float | None = None
    """From the first signal until the cluster had decided that the node is lost."""


class Observed(msgspec.Struct):
    """What a run has shown."""

    faults: list[Happened] = []
    answers: list[Answer] = []
    reference: list[Answer] | None = None
    """The answers to the same requests without faults."""
    lost_without_faults: list[str] = []
    """Requests of that run that were lost, each with what happened to it."""
    lane_back_seconds: float | None = None
    whole_at: float | None = None
    """`time.monotonic()` of when every lane was back; None: it was not seen."""
    moved_seconds: list[float | None] = []
    """Of each node that was made slow."""
    recoveries: list[dict[str, Any]] = []
    """The cluster's own records, from before the run without faults on."""
    unexpected: list[str] = []
    """Losses among them that no fault called for."""
    left_behind: list[str] | None = None
    """None when the cluster is not ours to stop."""


class Verdict(msgspec.Struct, frozen=True):
    """One check."""

    check: str
    wanted: str
    found: str
    holds: bool
    is_judged: bool = True
    """Whether there was anything that could have broken it."""

    @property
    def mark(self) -> str:
        """What has become of it."""
        if not self.is_judged:
            return "not judged"
        return "holds" if self.holds else "does not hold"


def judge(checks: Checks, seen: Observed) -> list[Verdict]:
    """A verdict for each check that is asked for."""
    verdicts = []
    if checks.lost_requests is not None:
        verdicts.append(_lost(checks.lost_requests, seen.answers))
    if checks.identical:
        verdicts.append(_identical(seen))
    since = min((fault.at for fault in seen.faults), default=0.0)
    detected = [fault.detected_seconds for fault in seen.faults if fault.is_to_be_detected]
    limits = (
        ("largest gap", checks.largest_gap_seconds, largest_gap(seen.answers, since, seen.whole_at)),
        ("detected within", checks.detected_seconds, _slowest(detected)),
        ("moved within", checks.moved_seconds, _slowest(seen.moved_seconds)),
        ("lane back within", checks.lane_back_seconds, seen.lane_back_seconds),
    )
    verdicts += [_limited(name, limit, value) for name, limit, value in limits if limit is not None]
    if checks.unexpected_losses is not None:
        verdicts.append(_counted(UNEXPECTED, checks.unexpected_losses, seen.unexpected))
    if checks.left_behind is not None and seen.left_behind is not None:
        verdicts.append(_counted("left behind", checks.left_behind, seen.left_behind))
    return verdicts


def harm(checks: Checks, seen: Observed) -> list[Verdict]:
    """What does not hold in a void run: whatever struck or did not, clients and other nodes were to notice nothing."""
    asked = Checks(
        lost_requests=checks.lost_requests,
        identical=checks.identical and len(lost(seen.answers)) < len(seen.answers),
        unexpected_losses=checks.unexpected_losses,
        left_behind=None,
    )
    verdicts = [*judge(asked, seen), _counted("requests lost without a fault", 0, seen.lost_without_faults)]
    return [verdict for verdict in verdicts if not verdict.holds]


def lost(answers: Sequence[Answer]) -> list[str]:
    """What happened to each request that was lost."""
    return [defect for answer in answers if (defect := answer.defect())]


def largest_gap(answers: Sequence[Answer], since: float, until: float | None = None) -> float | None:
    """The longest wait between two tokens of a stream that ended after `since`; None when no token came after it.

    One that began after `until`, when the cluster was whole again, is no fault's: long prompts take their time as well.
    """
    waits = [
        later - earlier
        for answer in answers
        for earlier, later in itertools.pairwise(answer.stream.times)
        if later > since and (until is None or earlier <= until)
    ]
    return max(waits, default=None)


def differences(answers: Sequence[Answer], reference: Sequence[Answer]) -> list[str]:
    """Names of the requests that got another text, token or logprob than without faults. Lost ones count elsewhere."""
    expected = {answer.stream.name: answer for answer in reference}
    return [
        answer.stream.name
        for answer in answers
        if answer.defect() is None and not _same(answer, expected[answer.stream.name])
    ]


def _same(one: Answer, other: Answer) -> bool:
    if one.was_cancelled and other.was_cancelled:
        # Where exactly a client hung up is an accident of how tokens share events.
        length = min(len(one.stream.text), len(other.stream.text))
        count = min(len(one.tokens.ids), len(other.tokens.ids))
        return one.stream.text[:length] == other.stream.text[:length] and _same_tokens(one.tokens, other.tokens, count)
    mine, theirs = one.stream, other.stream
    same_text = (mine.text, mine.tokens, mine.finish_reason) == (theirs.text, theirs.tokens, theirs.finish_reason)
    return same_text and _same_tokens(one.tokens, other.tokens)


def _same_tokens(one: Tokens, other: Tokens, count: int | None = None) -> bool:
    if one.ids[:count] != other.ids[:count] or len(one.logprobs[:count]) != len(other.logprobs[:count]):
        return False
    return all(itertools.starmap(_is_close, zip(one.logprobs[:count], other.logprobs[:count], strict=True)))


def _is_close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= LOGPROB_TOLERANCE


def _lost(most: int, answers: Sequence[Answer]) -> Verdict:
    found = lost(answers)
    example = f" ({found[0]})" if found else ""
    return Verdict("requests lost", f"at most {most}", f"{len(found)} of {len(answers)}{example}", len(found) <= most)


def _counted(check: str, most: int, found: Sequence[str]) -> Verdict:
    return Verdict(check, f"at most {most}", f"{len(found)}" + (f" ({found[0]})" if found else ""), len(found) <= most)


def _identical(seen: Observed) -> Verdict:
    if seen.reference is None:
        return Verdict("texts identical", "all", "there is no run without faults", holds=False)
    different = differences(seen.answers, seen.reference)
    compared = len(seen.answers) - len(lost(seen.answers))
    found = f"{len(different)} differ ({different[0]})" if different else f"all of {compared} compared"
    return Verdict("texts identical", "all", found, compared > 0 and not different)


def _slowest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _limited(name: str, limit: float, value: float | None) -> Verdict:
    if value is None:
        return Verdict(name, f"at most {limit:g} s", "never", holds=False)
    return Verdict(name, f"at most {limit:g} s", f"{value:.3f} s", value <= limit)
