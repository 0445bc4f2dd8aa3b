"""The object cache: what was not used for longest goes, and what others could have written is not used."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import convsched as cs
from convsched.errors import CacheWarning
from convsched.kernels import objects


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
        objects.write_entry(f"{number:064d}", {}, b"code" * 100)
        paths.append(folder / f"{number:064d}")
        age(paths[-1], 1000 + number)
    return paths


def test_entries_used_last_are_kept(folder: Path) -> None:
    paths = fill(folder, 4)
    size = paths[0].stat().st_size
    assert objects.usage() == (4, 4 * size)
    assert objects.read_entry(paths[0].name) is not None  # it is used
    assert objects.prune_entries(3 * size) == (2, 2, 2 * size)
    assert {path.name for path in folder.iterdir()} == {paths[0].name, paths[3].name}
    assert objects.prune_entries(3 * size) == (0, 2, 2 * size)
    assert objects.prune_entries(0) == (2, 0, 0)
    assert objects.usage() == (0, 0)


def test_writing_keeps_the_folder_within_its_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = fill(folder, 100)
    limit = 10 * paths[0].stat().st_size
    monkeypatch.setattr(objects, "LIMIT_BYTES", limit)
    objects.write_entry("1" * 64, {}, b"code")
    assert objects.usage()[0] == 101  # most writes do not look
    objects.write_entry("1" * 62 + objects.CHECK_SUFFIX, {}, b"code")
    assert objects.usage()[1] < limit
    assert (folder / ("1" * 64)).exists()
    assert not paths[0].exists()


def test_what_a_dead_writer_left_goes_too(folder: Path) -> None:
    fill(folder, 1)
    (folder / "tmpdead").write_bytes(b"half an entry")
    (folder / "a folder").mkdir()
    assert objects.prune_entries(0) == (2, 0, 0)
    assert [path.name for path in folder.iterdir()] == ["a folder"]


def test_entries_that_cannot_be_removed_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = fill(folder, 3)[0].stat().st_size

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(objects.os, "unlink", refuse)
    assert objects.prune_entries(0) == (0, 3, 3 * size)


def test_entries_that_another_process_removes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder, 3)
    unlink = os.unlink

    def unlink_twice(path: str) -> None:
        unlink(path)
        unlink(path)

    monkeypatch.setattr(objects.os, "unlink", unlink_twice)
    assert objects.prune_entries(0) == (3, 0, 0)


def test_no_folder_has_nothing_to_prune(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert objects.prune_entries(0) == (0, 0, 0)
    monkeypatch.setenv("CONVSCHED_CACHE", "/dev/null/cache")
    assert objects.prune_entries(0) == (0, 0, 0)


PRUNE = """
import os
from convsched.kernels import objects
for number in range(300):
    key = f"{number:064d}"
    objects.write_entry(key, {}, os.urandom(100))
    objects.read_entry(key)
    objects.prune_entries(number % 3 * 1000)
print("done")
"""


def test_processes_prune_a_folder_that_others_use(folder: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PRUNE], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True) for _ in range(3)]  # fmt: skip
    results = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert results == [("done\n", "", 0)] * 3
    assert all(objects.read_entry(path.name) is not None for path in folder.iterdir())


# Who may have written an entry

KEY = "1" * 64
NOBODY = 65534
on_unix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs owners and modes of Unix")
as_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root gives files away")


def written(folder: Path) -> Path:
    """An entry that is used."""
    objects.write_entry(KEY, {"a": 1}, b"code")
    assert objects.read_entry(KEY) == ({"a": 1}, b"code")
    return folder / KEY


def told_once(times: int) -> str:
    """What is said of a folder that is neither read nor written, however often it is used."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            assert objects.read_entry(KEY) is None
            objects.write_entry("2" * 64, {}, b"code")
    (told,) = caught
    assert told.category is CacheWarning
    return str(told.message)


@on_unix
def test_the_folder_and_its_entries_are_the_users_alone(folder: Path) -> None:
    """Also where the mask leaves groups the right to write."""
    before = os.umask(0o000)
    try:
        entry = written(folder)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert entry.stat().st_mode & 0o022 == 0


@on_unix
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777, 0o757])
def test_a_folder_that_others_can_write_is_not_used(folder: Path, mode: int) -> None:
    entry = written(folder)
    folder.chmod(mode)
    assert told_once(3) == f"compiled kernels are not kept in {folder}: {folder} can be written by others " \
                           f"(mode {mode:o}): chmod go-w"
    assert list(folder.iterdir()) == [entry]
    folder.chmod(0o755)
    assert objects.read_entry(KEY) is not None


@on_unix
@pytest.mark.parametrize(("mode", "is_used"), [(0o777, False), (0o1777, True), (0o775, True)])
def test_a_folder_that_others_can_replace_is_not_used(folder: Path, mode: int, is_used: bool) -> None:
    """Others can rename what is in a folder that all can write; what they put in its place is not this user's."""
    written(folder)
    folder.parent.chmod(mode)
    if is_used:
        written(folder)
    else:
        assert f"{folder.parent} can be written by others (mode {mode:o})" in told_once(3)


@on_unix
@as_root
def test_the_folder_of_another_user_is_not_used(folder: Path) -> None:
    written(folder)
    os.chown(folder, NOBODY, NOBODY)
    assert f"{folder} belongs to user {NOBODY}: let CONVSCHED_CACHE name a folder of your own" in told_once(3)


@on_unix
@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_an_entry_that_others_can_write_is_a_miss_and_is_replaced(folder: Path, mode: int) -> None:
    written(folder).chmod(mode)
    assert objects.read_entry(KEY) is None
    written(folder)


@on_unix
@as_root
def test_an_entry_of_another_user_is_a_miss_and_is_replaced(folder: Path) -> None:
    os.chown(written(folder), NOBODY, NOBODY)
    assert objects.read_entry(KEY) is None
    written(folder)


@on_unix
@pytest.mark.parametrize("kind", ["pipe", "link", "socket", "device"])
def test_an_entry_that_is_not_a_file_is_a_miss_and_is_replaced(folder: Path, kind: str) -> None:
    """To open a pipe would wait for its writer for ever."""
    entry = written(folder)
    moved = entry.rename(folder.parent / "moved")
    if kind == "pipe":
        os.mkfifo(entry)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound, pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)  # the names of sockets are short
            bound.bind(KEY)
    else:
        entry.symlink_to(moved if kind == "link" else "/dev/zero")
    assert objects.read_entry(KEY) is None
    written(folder)


@on_unix
def test_a_kernel_is_compiled_beside_a_folder_open_to_all(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    layer = cs.Conv2d(2, 3, 3, input_size=5, bias=False)
    with pytest.warns(CacheWarning, match="compiled kernels are not kept"):
        kernel = cs.compile(layer, threads=1, cache=False)
    assert (kernel(np.ones(layer.input_shape, np.float32), np.ones(layer.weight_shape, np.float32)) == 18).all()
    assert not list(folder.iterdir())
