"""The one exception tree. Every message is one line for a person: what happened, to what, what to do.

::

    KevlarFlowError
    ├── UsageError               a flag or a combination of flags that cannot work
    │   ├── Unsupported          a vLLM feature that is not yet safe under failover
    │   └── NotEnoughMemory      the machine cannot hold what the flags ask for
    ├── ModelUnavailable         the model cannot be found, fetched or converted
    ├── IncompatibleVllm         the installed vLLM is not one this release was written against
    ├── StartupFailed            a process of the cluster died or hung before it was ready
    ├── ClusterUnreachable       no controller answers
    ├── RequestRefused           the controller will not do what was asked for
    └── ProtocolViolation        a peer sent what the protocol forbids; the message is dropped
        └── IllegalTransition    an event that the state machine has no row for; carries the story
"""

from __future__ import annotations

INTERRUPTED = 130
"""Exit status of a command that was interrupted before it had done what it was for."""


class KevlarFlowError(Exception):
    """Base of every error that KevlarFlow raises on purpose."""

    exit_status = 1


class UsageError(KevlarFlowError):
    """A flag, or a combination of flags, that cannot work; names the flag to change."""

    exit_status = 2


class Unsupported(UsageError):
    """A vLLM feature that is not yet safe under failover."""


class NotEnoughMemory(UsageError):
    """The machine cannot hold what the flags ask for; says how much is needed."""


class ModelUnavailable(KevlarFlowError):
    """The model cannot be found, fetched or converted."""


class IncompatibleVllm(KevlarFlowError):
    """The installed vLLM lacks a seam that KevlarFlow uses; names the seam and the version."""


class StartupFailed(KevlarFlowError):
    """A process of the cluster died, or never got ready, before the first request was served."""


class ClusterUnreachable(KevlarFlowError):
    """No controller answers on the port that was asked."""


class RequestRefused(KevlarFlowError):
    """The controller will not do what a command asked for; says why."""


class ProtocolViolation(KevlarFlowError):
    """A peer sent what the protocol forbids."""


class IllegalTransition(ProtocolViolation):
    """An event that a state machine has no row for."""

    def __init__(self, subject: str, state: str, event: str, story: str = "") -> None:
        self.story = story
        super().__init__(f"{subject} is {state}: it cannot take {event}" + (f"\n{story}" if story else ""))
