"""Events, commands and messages in a few words, for the story of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.events import Snapshot
from kevlarflow.recovery.ledger import LedgerEntry
from kevlarflow.recovery.recompute import Span
from kevlarflow.types import LaneCoverage, Member, NodeInfo, Phases

_LEFT_OUT = (Phases, LaneCoverage, Snapshot)
MOST_ITEMS = 24


def words(value: Any) -> str:
    """`value` in a few words: what everybody knows is left out."""
    match value:
        case NodeInfo():
            return str(value.member)
        case Replica():
            return f"{value.block}:{value.generation}:{value.filled}"
        case LedgerEntry():
            return f"{value.request} {value.computed}/{len(value.tokens)} in {value.blocks}"
        case Span():
            return f"{value.request} {value.start}-{value.end} in {list(value.blocks)}"
        case list() | tuple() | set() | frozenset():
            more = "" if len(value) <= MOST_ITEMS else " ..."
            return "[" + ", ".join(words(each) for each in list(value)[:MOST_ITEMS]) + more + "]"
        case Member() | str() | int() | float() | None:
            return str(value)
    return _fields(value)


def _fields(value: Any) -> str:
    """Those that say something."""
    if isinstance(value, msgspec.Struct):
        names = [each.name for each in msgspec.structs.fields(value)]
    elif dataclasses.is_dataclass(value):
        names = [each.name for each in dataclasses.fields(value)]
    else:
        return str(value)
    fields = ((name, getattr(value, name)) for name in names)
    told = [f"{name} {words(each)}" for name, each in fields if each and not isinstance(each, _LEFT_OUT)]
    return f"{type(value).__name__}({', '.join(told)})"
