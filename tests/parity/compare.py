"""Compares what a request got with what stock vLLM gave: every token, text cut, logprob, ending and count.

One thing is excused, and listed: where the reference's two best logprobs are closer than 1e-4, float32 sums in another
order may pick the other token, and from there on the streams answer different questions. Only greedy requests without
penalties have such a margin; a sampled token has no excuse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from parity.client import Recording
from parity.transcript import Choice, Transcript, transcribe
from parity.workload import Request

LOGPROB_TOLERANCE = 1e-3
TIE_MARGIN = 1e-4
RANK_TOLERANCE = 0.01
"""Of a rank: far down the vocabulary neighbours are closer than float32 sums are exact."""

Margins = Sequence[float]
"""For each token of a reference: best logprob minus second best."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing that is not as in the reference."""

    request: str
    what: str
    expected: Any
    actual: Any
    excused: bool = False

    def __str__(self) -> str:
        note = " (excused: a tie in the reference)" if self.excused else ""
        return f"{self.request}: {self.what}: expected {self.expected!r}, got {self.actual!r}{note}"


def compare_all(
    requests: Sequence[Request],
    expected: Mapping[str, Recording],
    actual: Mapping[str, Recording],
    margins: Mapping[str, Margins],
) -> list[Difference]:
    """Differences over a whole workload; a request without a recording is one."""
    found: list[Difference] = []
    for request in requests:
        if request.name not in actual:
            found.append(Difference(request.name, "recording", "one", None))
        else:
            found += compare(request, expected[request.name], actual[request.name], margins.get(request.name, ()))
    return found


def compare(request: Request, expected: Recording, actual: Recording, margins: Margins = ()) -> list[Difference]:
    """Differences of one request."""
    report = _Report(request.name)
    report.check("failure", expected.failure, actual.failure)
    report.check("HTTP status", expected.status, actual.status)
    wants_cancel = request.cancel_after_events is not None
    report.check("cancelled", wants_cancel, actual.cancelled)
    report.check("end mark", not wants_cancel, actual.done)
    left, right = transcribe(expected), transcribe(actual)
    if actual.cancelled:
        _cut_to(left, right)
    report.check("choices", sorted(left.choices), sorted(right.choices))
    for index in left.choices.keys() & right.choices.keys():
        if _compare_choice(report, f"choice {index}", left.choices[index], right.choices[index], margins):
            return report.found
    report.check("other events", left.rest, right.rest)
    report.check_list("prompt logprob", left.prompt_logprobs, right.prompt_logprobs, _same_prompt_entry)
    return report.found


def unexcused(differences: Sequence[Difference]) -> list[Difference]:
    """Those that are failures."""
    return [difference for difference in differences if not difference.excused]


class _Report:
    def __init__(self, request: str) -> None:
        self.request = request
        self.found: list[Difference] = []

    def add(self, what: str, expected: Any, actual: Any, excused: bool = False) -> None:
        self.found.append(Difference(self.request, what, expected, actual, excused))

    def check(self, what: str, expected: Any, actual: Any) -> None:
        if expected != actual:
            self.add(what, expected, actual)

    def check_list(self, what: str, expected: list[Any], actual: list[Any], same: Callable[[Any, Any], bool]) -> None:
        self.check(f"number of {what}s", len(expected), len(actual))
        for index, (left, right) in enumerate(zip(expected, actual, strict=False)):
            if not same(left, right):
                self.add(f"{what} {index}", left, right)
                return


def _compare_choice(report: _Report, name: str, left: Choice, right: Choice, margins: Margins) -> bool:
    """Compare one choice; True if an excused tie makes the rest of the request incomparable."""
    position = _first_difference(left.tokens, right.tokens)
    if position is not None:
        excused = position < min(len(left.tokens), len(right.tokens), len(margins)) and (margins[position] < TIE_MARGIN)
        report.add(f"{name}, token {position}", left.tokens[position:], right.tokens[position:], excused=excused)
        if excused:
            return True
    for count in sorted(left.cuts.keys() & right.cuts.keys()):
        if left.cuts[count] != right.cuts[count]:
            report.add(f"{name}, text after {count} tokens", left.cuts[count], right.cuts[count])
            break
    report.check(f"{name}, text", left.text, right.text)
    report.check(f"{name}, finish_reason", left.finish_reason, right.finish_reason)
    report.check(f"{name}, events after the last", left.after_finish, right.after_finish)
    report.check(f"{name}, frames", left.frames, right.frames)
    report.check_list(f"{name}, logprob", left.logprobs, right.logprobs, _same_entry)
    return False


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _cut_to(whole: Transcript, part: Transcript) -> None:
    """Shorten the transcript of a whole answer to what a client that left early can have seen."""
    whole.rest = part.rest = []
    for index, choice in part.choices.items():
        if (full := whole.choices.get(index)) is None:
            continue
        count = len(choice.tokens)
        full.tokens, full.logprobs = full.tokens[:count], full.logprobs[: len(choice.logprobs)]
        full.text = full.cuts.get(count, choice.text if full.text.startswith(choice.text) else full.text)
        full.finish_reason, full.after_finish = choice.finish_reason, choice.after_finish
        full.frames = [frame for frame in full.frames if frame in choice.frames]
    whole.choices = {index: whole.choices[index] for index in whole.choices.keys() & part.choices.keys()}


def _same_entry(left: dict[str, Any], right: dict[str, Any]) -> bool:
    if left.keys() != right.keys() or left["token"] != right["token"]:
        return False
    if left.get("offset") != right.get("offset") or not _close(left["logprob"], right["logprob"]):
        return False
    return _same_alternatives(left["top"], right["top"])


def _same_alternatives(left: dict[str, float], right: dict[str, float]) -> bool:
    if len(left) != len(right):
        return False
    if not left:
        return True
    # At the end of a top list a near tie decides who is on it, so an absent one counts as the last.
    last_left, last_right = min(left.values()), min(right.values())
    return all(_close(left.get(name, last_left), right.get(name, last_right)) for name in left.keys() | right.keys())


def _same_prompt_entry(left: dict[str, Any] | None, right: dict[str, Any] | None) -> bool:
    if not left or not right:
        return left == right
    for name in left.keys() & right.keys():
        slack = 1 + RANK_TOLERANCE * left[name]["rank"]
        if abs(left[name]["rank"] - right[name]["rank"]) > slack:
            return False
        if left[name]["decoded_token"] != right[name]["decoded_token"]:
            return False
    return _same_alternatives(
        {name: entry["logprob"] for name, entry in left.items()},
        {name: entry["logprob"] for name, entry in right.items()},
    )


def _close(left: float | None, right: float | None) -> bool:
    if left is None or right is None:
        return left is right
    return math.isclose(left, right, rel_tol=0.0, abs_tol=LOGPROB_TOLERANCE)
