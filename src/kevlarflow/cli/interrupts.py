"""Whoever ends a command by SIGTERM or SIGHUP gets the same cleaning up as with Ctrl-C. `nohup` is respected."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def treated_as_interrupt() -> Iterator[None]:
    """While the block runs SIGTERM and SIGHUP are Ctrl-C, unless whoever started us has them ignored.

    Who takes the signals in the block keeps them: there is no moment in which nobody has them.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            is_ours = signal.getsignal(number) in {_interrupt, signal.default_int_handler}
            if is_ours and handler is not None:  # Python does not know it, and nobody has changed it.
                signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A script has started us in the background, where Ctrl-C is not for us. This is.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
