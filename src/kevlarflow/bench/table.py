"""A table before it is known where it will be shown, and how numbers are written in one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

NOTHING = "-"


class Table(msgspec.Struct, frozen=True):
    """Cells are text, a remark is a line below; there may be fewer cells in a row than headers."""

    title: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]
    remarks: list[str] = msgspec.field(default_factory=list)


def milliseconds(seconds: float) -> str:
    """A duration, for people."""
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def told_attempts(earlier: Sequence[str]) -> str:
    """Which attempt something is, and what the earlier ones were."""
    return "; ".join([f"attempt {len(earlier) + 1}", *(f"{n}: {what}" for n, what in enumerate(earlier, 1))])


def told_before(attempts: Sequence[str]) -> list[str]:
    """Remarks on what was void before it was measured again."""
    return [f"earlier attempt: {each}" for each in attempts]


def verdict(is_reached: bool) -> str:
    """Whether something that is required was reached, in words."""
    return "reached" if is_reached else "NOT REACHED"
