"""What the simulator can find."""

from __future__ import annotations


class Violation(AssertionError):
    """An invariant of the design does not hold."""


class WrongKv(Violation):
    """A request would have read KV that is not its own."""


class WrongTokens(Violation):
    """A request did not end with the tokens of a run without failure."""


class Stuck(Violation):
    """Nothing can happen any more, and not every request has ended."""
