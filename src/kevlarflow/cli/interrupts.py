"""Whoever ends a command by SIGTERM or SIGHUP gets the same cleaning up as with Ctrl-C. `nohup` is respected."""

from __future__ import annotations

import signal


def treat_as_interrupt() -> None:
    """From now on SIGTERM and SIGHUP are Ctrl-C, unless whoever started us has them ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A script has started us in the background, where Ctrl-C is not for us. This is.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
