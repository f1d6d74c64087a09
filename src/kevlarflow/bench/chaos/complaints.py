"""What is wrong with a YAML file, in the words of whoever wrote it: line, key, and what to write instead.

msgspec finds the first mistake and names its place (``Expected `int`, got `str` - at `$.load.streams```); what stands
there is looked up in the file for its line, and in the type for what it could be.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import yaml
from msgspec import inspect

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping of keys to values",
    "null": "nothing",
}
"""msgspec's names of types, for people."""

Keys = list[str | int]


def complaint(source: str, root: yaml.Node, kind: type[msgspec.Struct], message: str) -> str:
    """One line about msgspec's `message` on a file that should be of a `kind`; `source` is what to call the file."""
    what, _, path = message.rpartition(" - at `$")
    if not what:
        what, path = message, ""
    keys: Keys = [key or int(index) for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path.rstrip("`"))]
    unknown = re.search(r"unknown field `(\w+)`", what)
    text = _in_words(what, _possible(inspect.type_info(kind), keys, root))
    if unknown:
        keys.append(unknown[1])
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
    line = _at(root, keys).start_mark.line + 1
    return f"{source}, line {line}{', ' * bool(where)}{where}: {text}"


def _in_words(what: str, possible: Sequence[str]) -> str:
    """What is wrong and what to do; `possible` are the keys or values that could stand there."""
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what):
        return f"there is no key {found[1]!r} here: {_advice(found[1], possible)}"
    if found := re.fullmatch(r"Invalid (?:enum )?value '(.*)'", what):
        return f"there is no {found[1]!r} here: {_advice(found[1], possible)}"
    if found := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"the key {found[1]!r} is missing"
    if found := re.fullmatch(r"Expected `([^`]*)`(.*?)(?:, got `(.*)`)?", what):
        is_instead = f", and is {_type_in_words(found[3])}" if found[3] else ""
        return f"this has to be {_type_in_words(found[1])}{found[2]}{is_instead}"
    return what[:1].lower() + what[1:]


def _type_in_words(names: str) -> str:
    return " or ".join(WORDS.get(name, name) for name in names.split(" | "))


def _advice(word: str, possible: Sequence[str]) -> str:
    likely = difflib.get_close_matches(word, possible, 1)
    return f"did you mean {likely[0]!r}?" if likely else f"use one of {', '.join(possible)}"


def _possible(kind: Any, keys: Keys, root: yaml.Node) -> list[str]:
    """The keys of the mapping at a place, or the values that may stand there; empty where there are too many."""
    for place, key in enumerate(keys):
        structs = _structs(kind)
        if isinstance(key, int):
            (kind,) = [each.item_type for each in _each(kind) if isinstance(each, inspect.VarTupleType)]
        elif any(each.tag_field == key for each in structs):
            return [str(each.tag) for each in structs]
        else:
            chosen = _chosen(structs, _at(root, keys[:place], inside=True))
            kind = next(field.type for field in chosen.fields if field.encode_name == key)
    enums = [each.cls for each in _each(kind) if isinstance(each, inspect.EnumType)]
    if enums:
        return [str(member.value) for member in enums[0]]
    structs = _structs(kind)
    if not structs:
        return []
    chosen = _chosen(structs, _at(root, keys, inside=True))
    return [*([chosen.tag_field] if chosen.tag_field else []), *(field.encode_name for field in chosen.fields)]


def _each(kind: Any) -> Iterable[Any]:
    """A type, or all of a union, without what is noted beside them."""
    if isinstance(kind, inspect.Metadata):
        return _each(kind.type)
    return kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _structs(kind: Any) -> list[inspect.StructType]:
    return [each for each in _each(kind) if isinstance(each, inspect.StructType)]


def _chosen(structs: Sequence[inspect.StructType], node: yaml.Node) -> inspect.StructType:
    """The one of a union that a mapping says it is."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    values = {name.value: value.value for name, value in pairs}
    return next((each for each in structs if values.get(each.tag_field) == each.tag), structs[0])


def _at(node: yaml.Node, keys: Keys, *, inside: bool = False) -> yaml.Node:
    """The node at a path, or the last one on the way; for its end the key, if it has one, unless `inside`."""
    for place, key in enumerate(keys):
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            node = node.value[key]
        elif isinstance(node, yaml.MappingNode):
            found = [(name, value) for name, value in node.value if name.value == key]
            if not found:
                return node
            node = found[0][0] if place == len(keys) - 1 and not inside else found[0][1]
    return node
