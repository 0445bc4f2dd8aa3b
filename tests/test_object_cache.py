"""The size of the object cache: what was not used for longest goes, whoever else uses the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convsched.kernels import jit


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cache entries."""
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "objects"


def age(path: Path, seconds: int) -> None:
    """Make an entry one last used so many seconds after 1970."""
    os.utime(path, (seconds, seconds))


def fill(folder: Path, count: int) -> list[Path]:
    """So many small entries, the first of them not used for longest."""
    paths = []
    for number in range(count):
        jit.write_entry(f"{number:064d}", {}, b"code" * 100)
        paths.append(folder / f"{number:064d}")
        age(paths[-1], 1000 + number)
    return paths


def test_entries_used_last_are_kept(folder: Path) -> None:
    paths = fill(folder, 4)
    size = paths[0].stat().st_size
    assert jit.usage() == (4, 4 * size)
    assert jit.read_entry(paths[0].name) is not None  # it is used
    assert jit.prune_entries(3 * size) == (2, 2, 2 * size)
    assert {path.name for path in folder.iterdir()} == {paths[0].name, paths[3].name}
    assert jit.prune_entries(3 * size) == (0, 2, 2 * size)
    assert jit.prune_entries(0) == (2, 0, 0)
    assert jit.usage() == (0, 0)


def test_writing_keeps_the_folder_within_its_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = fill(folder, 100)
    limit = 10 * paths[0].stat().st_size
    monkeypatch.setattr(jit, "LIMIT", limit)
    jit.write_entry("1" * 64, {}, b"code")
    assert jit.usage()[0] == 101  # most writes do not look
    jit.write_entry("1" * 62 + jit.CHECKED, {}, b"code")
    assert jit.usage()[1] < limit
    assert (folder / ("1" * 64)).exists()
    assert not paths[0].exists()


def test_what_a_dead_writer_left_goes_too(folder: Path) -> None:
    fill(folder, 1)
    (folder / "tmpdead").write_bytes(b"half an entry")
    (folder / "a folder").mkdir()
    assert jit.prune_entries(0) == (2, 0, 0)
    assert [path.name for path in folder.iterdir()] == ["a folder"]


def test_entries_that_cannot_be_removed_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = fill(folder, 3)[0].stat().st_size

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(jit.os, "unlink", refuse)
    assert jit.prune_entries(0) == (0, 3, 3 * size)


def test_entries_that_another_process_removes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder, 3)
    unlink = os.unlink

    def unlink_twice(path: str) -> None:
        unlink(path)
        unlink(path)

    monkeypatch.setattr(jit.os, "unlink", unlink_twice)
    assert jit.prune_entries(0) == (3, 0, 0)


def test_no_folder_has_nothing_to_prune(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jit.prune_entries(0) == (0, 0, 0)
    monkeypatch.setenv("CONVSCHED_CACHE", "/dev/null/cache")
    assert jit.prune_entries(0) == (0, 0, 0)


PRUNE = """
import os
from convsched.kernels import jit
for number in range(300):
    key = f"{number:064d}"
    jit.write_entry(key, {}, os.urandom(100))
    jit.read_entry(key)
    jit.prune_entries(number % 3 * 1000)
print("done")
"""


def test_processes_prune_a_folder_that_others_use(folder: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PRUNE], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True) for _ in range(3)]  # fmt: skip
    results = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert results == [("done\n", "", 0)] * 3
    assert all(jit.read_entry(path.name) is not None for path in folder.iterdir())
