"""What the simulator can find."""

from __future__ import annotations


class Violation(AssertionError):
    """An invariant of the design does not hold."""


class WrongKv(Violation):
    """A request would have read KV that is not its own."""


class WrongDraw(Violation):
    """A request's random generator is not where its output is: what is sampled next would differ."""


class WrongTokens(Violation):
    """A request did not get the tokens of a run without failure."""


class WrongCopy(Violation):
    """A standby keeps something else than the tag of the copy says."""


class NotFenced(Violation):
    """Something of an old epoch, or of another engine, had an effect."""


class NoReason(Violation):
    """A request ended with an error, or a pipeline was suspended, though it could have gone on."""


class Unblamed(Violation):
    """A node was taken for killed or stopped by somebody that was not: what it computed would go on costing nodes."""


class FalseAlarm(Violation):
    """A node was taken for slow, or for dead, that is as fast as its peers, or does what it is there for."""


class Overlooked(Violation):
    """A node is far slower than its peers for long, hangs, or hears nothing, and nothing is done about it."""


class Unbounded(Violation):
    """A queue holds more than it ever should."""


class Stuck(Violation):
    """All faults are over, and yet not every request ends, or not every pipeline serves with its own nodes."""


class Restless(Violation):
    """All faults are over and everything was well, and yet something is mended, moved or formed anew."""


class Hoarded(Violation):
    """A pipeline that waits for a node keeps a lane, whose memory others could use."""


class WrongBlocks(Violation):
    """A pipeline uses KV blocks beyond its share."""
