"""What the command lines of all commands have in common: what is wrong with one is said in one line.

`kevlarflow serve` has a parser of its own (`kevlarflow.cli.flags`).
"""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from kevlarflow.config import DEFAULT_PORT
from kevlarflow.errors import UsageError

LAST_PORT = 2**16 - 1


class Parser(argparse.ArgumentParser):
    """argparse's, which answers without its usage: ``--help`` shows that."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        self.exit(UsageError.exit_status, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def add_port(parser: argparse.ArgumentParser) -> None:
    """The flag that names a running cluster."""
    parser.add_argument("--port", type=port, default=DEFAULT_PORT, help="port of the cluster (%(default)s)")


def port(text: str) -> int:
    """The type of a port."""
    if not text.isdecimal() or not 0 < int(text) <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text} is no port: use 1 to {LAST_PORT}")
    return int(text)


def amount(text: str) -> float:
    """The type of a time: any number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def human_integer(text: str) -> int:
    """vLLM's notation for large numbers: 512m is 512,000,000 and 512M is 512 x 2**20. Raises `ValueError`."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgtKMGT]?)", text.strip())
    if not match or ("." in match[1] and not match[2].islower()):
        raise ValueError(text)
    number, suffix = match.groups()
    power = "kmgt".find(suffix.lower()) + 1 if suffix else 0
    return int(float(number) * 1000**power) if suffix.islower() else int(number) * 1024**power


def memory_size(text: str) -> int:
    """The type of a number of bytes above 0, in vLLM's notation."""
    try:
        number = human_integer(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of bytes, such as 512M or 2G")
    return number


def count(text: str) -> int:
    """The type of a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of 1 or more")
    return int(text)
