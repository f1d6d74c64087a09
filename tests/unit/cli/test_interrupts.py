"""SIGTERM ends a command as Ctrl-C does, also one that a script has started in the background."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal, sys, time
from kevlarflow.cli.interrupts import treat_as_interrupt

if sys.argv[1] == "background":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
treat_as_interrupt()
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("cleaned up", flush=True)
"""


@pytest.mark.parametrize("place", ["foreground", "background"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_it_is_ended_as_by_ctrl_c(place, number):
    with subprocess.Popen([sys.executable, "-c", PROGRAM, place], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=30)[0] == "cleaned up\n"
