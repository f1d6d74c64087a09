"""The command line of ``kevlarflow serve``: takes the flags that are KevlarFlow's, keeps the rest for vLLM.

vLLM has some three hundred flags, and its parser takes 8 s to import. So this parser knows KevlarFlow's flags only,
and leaves everything else as it was typed (`cli.vllm_flags` looks whether there is such a flag). It does not know of
every foreign flag whether it takes a value; a word that stands behind one therefore goes to vLLM with it, unless that
is known to be a switch. MODEL is a word that does not: it comes first, or behind a switch or a flag of ours.
Names are read as vLLM reads them: long or short, ``--flag value`` or ``--flag=value``, dashes or underscores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kevlarflow.cli import config_file
from kevlarflow.cli.vllm_flags import is_switch
from kevlarflow.command_line import human_integer
from kevlarflow.config import DEFAULT_PORT
from kevlarflow.errors import UsageError

CONFIG_FILE = "--config"
"""vLLM's flag for a file with more flags."""


class ServeFlags(msgspec.Struct):
    """What was typed. None stands for "not said"."""

    model: str | None = None
    stages: int = 1
    pipelines: int = 1
    ranks: int = 1
    host: str | None = None
    port: int = DEFAULT_PORT
    kv_cache_memory_bytes: int | None = None
    standby_memory_bytes: int | None = None
    replication_interval_tokens: int | None = None
    replication_bandwidth: int | None = None
    slow_node_ratio: float | None = None
    slow_node_seconds: float | None = None
    replacement_wait: float | None = None
    vllm_args: list[str] = msgspec.field(default_factory=list)
    help: str | None = None
    """Empty for ``--help``; the topic in ``--help=topic``, which is vLLM's to explain."""


def _integer(text: str) -> int:
    return int(text)


_TAKEN: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--model": ("model", str),
    "-pp": ("stages", _integer),
    "--pipeline-parallel-size": ("stages", _integer),
    "-dp": ("pipelines", _integer),
    "--data-parallel-size": ("pipelines", _integer),
    "-tp": ("ranks", _integer),
    "--tensor-parallel-size": ("ranks", _integer),
    "--host": ("host", str),
    "--port": ("port", _integer),
    "--kv-cache-memory-bytes": ("kv_cache_memory_bytes", human_integer),
    "--standby-memory-bytes": ("standby_memory_bytes", human_integer),
    "--replication-interval-tokens": ("replication_interval_tokens", _integer),
    "--replication-bandwidth": ("replication_bandwidth", human_integer),
    "--slow-node-ratio": ("slow_node_ratio", float),
    "--slow-node-seconds": ("slow_node_seconds", float),
    "--replacement-wait": ("replacement_wait", float),
}
_MEANT: dict[Callable[[str], Any], str] = {
    _integer: "a whole number",
    human_integer: "a number of bytes, such as 512M or 2G",
}

OURS = tuple(_TAKEN)
"""The names that are taken here; vLLM has some of them as well."""


def parse(words: list[str]) -> ServeFlags:
    """Read a command line; raise `UsageError` for a flag of ours that makes no sense."""
    flags = ServeFlags()
    rest = list(words)
    foreign_flag_is_open = False
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name in {"-h", "--help"}:
            flags.help = value
        elif name in _TAKEN:
            if not equals:
                value = _value_of(name, rest)
            _take(flags, name, value)
            foreign_flag_is_open = False
        elif word.startswith("-"):
            flags.vllm_args.append(word)
            foreign_flag_is_open = not equals and not is_switch(name)
        elif foreign_flag_is_open or flags.model is not None:
            flags.vllm_args.append(word)
        else:
            flags.model = word
    return flags


def _value_of(name: str, rest: list[str]) -> str:
    if not rest:
        raise UsageError(f"{name} needs a value")
    return rest.pop(0)


def _take(flags: ServeFlags, name: str, value: str) -> None:
    field, convert = _TAKEN[name]
    try:
        setattr(flags, field, convert(value))
    except ValueError as error:
        raise UsageError(f"{name} {value} is not {_MEANT.get(convert, 'a number')}") from error


def refuse_ours_in_file(vllm_args: list[str]) -> None:
    """Raise `UsageError` when the file of --config has a flag that is read from the command line only."""
    usual, said = ServeFlags(), parse(words_of_file(vllm_args))
    long_names = {field: name for name, (field, _) in _TAKEN.items()}
    for field, name in long_names.items():
        if getattr(said, field) != getattr(usual, field):
            path = vllm_args[_place_of_file(vllm_args)]
            raise UsageError(f"{name} is not read from {path} (--config): write it on the command line")


def value_given(vllm_args: list[str], name: str) -> str | None:
    """Return the value of a flag of vLLM's, when it was typed in full, or else is in the file of --config.

    Of several the last one counts, as it does for vLLM; of several values of one flag it is the first.
    """
    value = _value_typed(vllm_args, name)
    return _value_typed(words_of_file(vllm_args), name) if value is None else value


def words_of_file(vllm_args: list[str]) -> list[str]:
    """What the file of --config says, if there is one. Raises `UsageError` when it cannot be read."""
    place = _place_of_file(vllm_args)
    return config_file.words(vllm_args[place]) if place else []


def with_copied_file(vllm_args: Sequence[str], folder: str) -> tuple[str, ...]:
    """The same flags with a copy of the file of --config, if there is one, that is in `folder`."""
    words = list(vllm_args)
    if place := _place_of_file(words):
        words[place] = config_file.copy(words[place], folder)
    return tuple(words)


def _place_of_file(words: list[str]) -> int:
    """Where the name of the file of --config stands; 0: nowhere. As one word, --config=FILE, vLLM takes no notice."""
    return words.index(CONFIG_FILE) + 1 if CONFIG_FILE in words[:-1] else 0


def _value_typed(words: list[str], name: str) -> str | None:
    for position in reversed(range(len(words))):
        flag, equals, value = words[position].partition("=")
        if flag.replace("_", "-") == name:
            following = words[position + 1 : position + 2]
            return value if equals else next(iter(following), None)
    return None
