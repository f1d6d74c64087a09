"""What the documents name is there: files, headings, verbs of make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for name, anchor in LINK.findall(document.read_text()):
        target = document.parent / name if name else document
        assert target.exists(), f"{document.name} links to {name}"
        if anchor:
            assert anchor in {anchor_of(heading) for heading in headings(target)}, f"{document.name}: {name}#{anchor}"


def headings(document: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_verbs_of_make_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = re.findall(r"`make ([a-z-]+(?:\|[a-z-]+)*)", document.read_text())
        assert {verb for each in named for verb in each.split("|")} <= verbs, document.name


def test_modules_that_the_architecture_names_exist() -> None:
    modules = {path.name for path in (ROOT / "src").rglob("*.py")}
    named = set(re.findall(r"`(?:[a-z]+/)*([a-z_0-9]+\.py)`", (ROOT / "ARCHITECTURE.md").read_text()))
    assert named
    assert named <= modules, named - modules


def test_the_architecture_names_every_module() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"\b([a-z_0-9]+\.py)\b", page))
    # Those of commands are named as a whole, and what an experiment yields and tells by its ending.
    modules = [path for path in (ROOT / "src").rglob("[a-z]*.py") if path.parent.name != "cli"]
    unnamed = {path.name for path in modules} - named
    assert not {name for name in unnamed if not name.endswith(("_results.py", "_report.py"))}
