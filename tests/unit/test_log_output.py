"""What a process says may be lost; saying it ends nobody. The processes here are real."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging, os, sys
from kevlarflow.log_output import lose_what_cannot_be_written

lose_what_cannot_be_written()
logging.basicConfig()
for number in range(1_000):
    print("a line that may be lost", number)
    print("one that is not waited for", file=sys.stderr, end="")
    logging.warning("and a third")
    sys.stdout.flush()
sys.stdout.write("ä \\udcff")
sys.stdout.flush()
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run(**streams: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", PROGRAM], check=False, timeout=60, **streams)  # type: ignore[call-overload, no-any-return]


def test_a_full_disk_ends_neither_the_process_nor_what_it_forks() -> None:
    with open("/dev/full", "wb") as full:
        assert run(stdout=full, stderr=full).returncode == 0


def test_a_reader_that_has_left_does_not_either() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run(stdout=writer, stderr=writer).returncode == 0
    finally:
        os.close(writer)


@pytest.mark.parametrize("buffering", ["", "1"])
def test_otherwise_everything_arrives(buffering: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": buffering}
    done = run(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert done.stdout.count(b"a line that may be lost") == 1_000
    assert done.stdout.decode().splitlines()[-1] == "ä \\udcff"
    assert done.stderr.count(b"one that is not waited for") == done.stderr.count(b"WARNING:root:and a third") == 1_000


def test_a_reader_that_does_not_read_is_not_waited_for_and_hears_the_rest_later() -> None:
    program = """
import sys
from kevlarflow.log_output import lose_what_cannot_be_written
lose_what_cannot_be_written()
for number in range(20_000):
    print("line", number)
print("done", file=sys.stderr, flush=True)
sys.stdin.read()
print("the last line")
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:  # type: ignore[call-overload]
        assert process.stderr.readline() == b"done\n", "though nobody has read a line"
        lines = process.communicate(timeout=60)[0].splitlines()
    # A pipe's worth and what was kept; what lies between was lost.
    assert lines[0] == b"line 0"
    assert lines[-2:] == [b"line 19999", b"the last line"]
    assert len(lines) < 20_000


def test_threads_do_not_get_into_one_anothers_lines() -> None:
    program = """
import threading
from kevlarflow.log_output import lose_what_cannot_be_written
lose_what_cannot_be_written()
def speak(name):
    for number in range(2_000):
        print(f"{name} says {number}\\n", end="")
threads = [threading.Thread(target=speak, args=(name,)) for name in "abc"]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.PIPE)
    lines = done.stdout.decode().splitlines()
    assert sorted(lines) == sorted(f"{name} says {number}" for name in "abc" for number in range(2_000))
