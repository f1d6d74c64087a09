"""SIGTERM ends a command as Ctrl-C does, also one that a script has started in the background."""

import signal
import subprocess
import sys

import pytest

from kevlarflow.cli.interrupts import treated_as_interrupt
from kevlarflow.errors import INTERRUPTED

PROGRAM = """
import signal, sys
from kevlarflow.cli.interrupts import treated_as_interrupt

signal.signal(signal.SIGHUP, signal.SIG_DFL)
for ignored in sys.argv[1:]:
    signal.signal(signal.Signals[ignored], signal.SIG_IGN)
try:
    with treated_as_interrupt():
        print("ready", flush=True)
        for line in sys.stdin:
            print("still here", flush=True)
except KeyboardInterrupt:
    print("cleaned up", flush=True)
"""


@pytest.mark.parametrize(
    ("ignored", "sent"),
    [
        ([], signal.SIGTERM),
        ([], signal.SIGHUP),
        (["SIGINT"], signal.SIGTERM),  # As in the background of a script.
        (["SIGINT"], signal.SIGHUP),
    ],
)
def test_it_is_ended_as_by_ctrl_c(ignored, sent):
    with _running(*ignored) as process:
        process.send_signal(sent)
        assert process.stdout.readline() == "cleaned up\n"


def test_a_terminal_that_is_closed_does_not_end_what_nohup_started():
    with _running("SIGHUP") as process:
        process.send_signal(signal.SIGHUP)
        process.stdin.write("?\n")
        process.stdin.flush()
        assert process.stdout.readline() == "still here\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "cleaned up\n"


def _running(*ignored):
    command = [sys.executable, "-c", PROGRAM, *ignored]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_afterwards_signals_mean_what_they_meant():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with treated_as_interrupt():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


BUILDING = """
import sys, time
from kevlarflow import default_model
from kevlarflow.cli import main

def build(*_):
    try:
        print("building", flush=True)
        time.sleep(600)
    finally:
        print("cleaned up", flush=True)

default_model.ensure_default_model = build
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("words", [["demo"], ["soak", "--output", "."], ["chaos", "crash"]], ids=lambda words: words[0])
def test_a_command_that_makes_the_default_model_cleans_up_when_it_is_ended(words, tmp_path):
    command = [sys.executable, "-c", BUILDING, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout.readline() == "building\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "cleaned up\n"
    assert process.returncode == INTERRUPTED


def test_who_has_taken_the_signals_meanwhile_keeps_them():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        with treated_as_interrupt():
            for number in numbers:
                signal.signal(number, _taken)
        assert [signal.getsignal(number) for number in numbers] == 3 * [_taken]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _taken(*_):
    pass
