"""The names of vLLM's flags, so that a misspelt one is refused in a moment, and not by vLLM when it has been imported.

`vllm_flags.txt` has the option strings of the one vLLM version that KevlarFlow works with; `scripts/vllm_flags.py`
writes it. What a word means is decided as vLLM's parser does: it takes underscores for dashes, the beginning of a name
for the name, ``--flag.key value`` for a part of a JSON value, and ``-O3`` for an optimization level. In doubt a word is
let through: vLLM has the last say.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Iterator
from importlib import resources

from kevlarflow.errors import UsageError

LIKENESS = 0.75
"""How like a name has to be to be what was meant, from 0 to 1."""
SHORT = 2
"""Characters of a one-letter option, to which a value may be stuck."""


def refuse_unknown(words: list[str], ours: Collection[str] = ()) -> None:
    """Raise `UsageError` for the first option that vLLM does not have. `ours` may be what was meant as well."""
    for name in options(words):
        if not _is_known(name):
            likely = difflib.get_close_matches(name, [*ours, *known()], 1, LIKENESS)
            guess = f": did you mean {likely[0]}?" if likely else ":"
            raise UsageError(f"there is no flag {name}{guess} kevlarflow serve --help=all lists all flags")


@functools.cache
def known() -> frozenset[str]:
    """All option strings of ``vllm serve``."""
    return frozenset((resources.files("kevlarflow.cli") / "vllm_flags.txt").read_text().split())


def is_switch(name: str) -> bool:
    """Whether a flag takes no value: it has an opposite. Those that have none and take none either are not known."""
    return name.startswith("--") and (f"--no-{name[2:]}" in known() or (name[:5] == "--no-" and name in known()))


def options(words: list[str]) -> Iterator[str]:
    """The names of all words that are options to vLLM's parser, without values and keys, and with dashes."""
    rest = iter(words)
    for word in rest:
        if word == "--":
            return  # Nothing behind it is an option.
        if not word.startswith("-") or word == "-" or " " in word or re.fullmatch(r"-\d+|-\d*\.\d+", word):
            continue
        name, equals, _ = word.partition("=")
        name, dot, _ = name.partition(".")
        if dot and not equals:
            next(rest, None)  # Its value, whatever that looks like.
        yield name.replace("_", "-") if name.startswith("--") else name


def _is_known(name: str) -> bool:
    if not name.startswith("--") and (name[:SHORT] == "-O" or name[:SHORT] in known()):
        return True
    return any(each.startswith(name) for each in known())
