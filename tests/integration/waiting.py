"""Waiting for a condition with a deadline, the only way in which these tests wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.1


def until(what: str, ask: Callable[[], T | None], timeout: float, poll: float = POLL_SECONDS) -> T:
    """Ask until the answer is true, and return it; fail after `timeout` seconds and say what was awaited."""
    deadline = time.monotonic() + timeout
    while True:
        answer = ask()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            raise AssertionError(f"after {timeout:.0f} s still not: {what} (last answer: {answer!r})")
        time.sleep(poll)
