"""How large logs may grow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kevlarflow.control import logs

LIMIT = 1000


def cut(folder: Path) -> None:
    logs.cut(folder, LIMIT)


def test_a_log_that_is_full_begins_anew_and_its_writer_goes_on_in_it(tmp_path: Path) -> None:
    log = tmp_path / "api-server.log"
    with log.open("ab", buffering=0) as writer:
        for letter in (b"a", b"b"):
            writer.write(LIMIT * letter)
            cut(tmp_path)
            assert log.stat().st_size == LIMIT
            writer.write(letter + b"\n")
            cut(tmp_path)
            assert log.read_bytes() == b""
            assert (tmp_path / "api-server.log.1").read_bytes() == (LIMIT - 1) * letter + b"\n"
            writer.write(b"on\n")
            assert log.read_bytes() == b"on\n"
            log.write_bytes(b"")
    assert sorted(os.listdir(tmp_path)) == ["api-server.log", "api-server.log.1"]


def test_of_a_log_that_has_grown_far_beyond_the_limit_the_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "node-0-1-1.log").write_bytes(9 * LIMIT * b"a" + b"the end")
    cut(tmp_path)
    kept = (tmp_path / "node-0-1-1.log.1").read_bytes()
    assert len(kept) == LIMIT
    assert kept.endswith(b"the end")


def test_a_disk_without_room_for_a_second_file_has_the_log_cut_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "zygote.log"
    log.write_bytes((LIMIT + 1) * b"a")
    (tmp_path / "zygote.log.1").symlink_to("/dev/full")
    cut(tmp_path)
    assert log.stat().st_size == 0
    assert os.listdir(tmp_path) == ["zygote.log"]


@pytest.mark.parametrize("kind", ["folder", "link", "nothing"])
def test_what_is_no_log_is_left_alone(tmp_path: Path, kind: str) -> None:
    folder, other = tmp_path / "logs", tmp_path / "other"
    other.write_bytes((LIMIT + 1) * b"a")
    if kind != "nothing":
        folder.mkdir()
    if kind == "folder":
        (folder / "a.log").mkdir()
    elif kind == "link":
        (folder / "a.log").symlink_to(other)
    cut(folder)
    assert other.stat().st_size == LIMIT + 1


def test_of_each_node_the_last_lives_are_kept(tmp_path: Path) -> None:
    # A controller that has forgotten everything may count from 1 again.
    for moment, life in enumerate([*range(5, 20), 1]):
        for name in ("node-0-1", "node-0-11"):
            log = tmp_path / f"{name}-{life}.log"
            log.touch()
            os.utime(log, (moment, moment))
    (tmp_path / "node-0-1-5.log.1").touch()
    (tmp_path / "api-server.log").touch()
    cut(tmp_path)
    kept = [*range(20 - logs.LIVES_KEPT + 1, 20), 1]
    expected = {f"{name}-{life}.log" for name in ("node-0-1", "node-0-11") for life in kept}
    assert set(os.listdir(tmp_path)) == expected | {"api-server.log"}
