"""The schedule cache on files and disks that take nothing, or give back something else."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import convsched as cs
from convsched.autotune.store import cache as cache_module
from convsched.autotune.store import database
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import CacheError, Key, Record
from convsched.errors import CacheWarning
from convsched.machine import Machine
from convsched.plan.plan import Target
from convsched.problem import Conv2d

KEY = Key.of(Conv2d(8, 16, 3, padding=1, input_size=14), Target(Machine.example("avx512")))


def make(schedule: str = "unroll c", hot: float = 1.0, time: float = 1.0) -> Record:
    return Record(**vars(KEY), algorithm="direct", schedule=schedule, status="ok", hot=hot, time=time)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "schedules.sqlite"


@pytest.fixture
def full(path: Path) -> ScheduleCache:
    """A cache of a few hundred kilobytes."""
    cache = ScheduleCache(path)
    lines = path.with_name("lines")
    lines.write_text("".join(f"{make(f'unroll c{i}', 1.0 + i).to_json()}\n" for i in range(300)))
    cache.import_(lines)
    return cache


def told_once(why: str, *calls: Callable[[], object]) -> list[object]:
    """The calls' results; there is one warning in all, which says this."""
    with pytest.warns(CacheWarning, match=re.escape(why)) as caught:
        results = [call() for call in calls]
    assert len(caught) == 1
    return results


def integrity(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return str(db.execute("PRAGMA integrity_check").fetchone()[0])


def spoil_start(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"not a database at all")


def spoil_pages(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(0).randbytes(size - 4096))


def truncate(fraction: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(int(path.stat().st_size * fraction))

    return spoil


SPOILED: dict[str, Callable[[Path], Any]] = {
    "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(50_000)),
    "text": lambda path: path.write_text("my notes\n"),
    "wrong start": spoil_start,
    "wrong pages": spoil_pages,
    "half": truncate(0.5),
    "nearly all": truncate(0.99),
    "50 bytes": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "a page": lambda path: path.write_bytes(path.read_bytes()[:4096]),
}
USES: dict[str, Callable[[ScheduleCache], Any]] = {
    "best": lambda cache: cache.best(KEY),
    "put": lambda cache: cache.put(make()),
    "entries": lambda cache: cache.entries(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_corrupt_file_is_moved_aside(
    full: ScheduleCache, spoil: Callable[[Path], Any], use: Callable[[ScheduleCache], Any]
) -> None:
    spoil(full.path)
    spoiled = full.path.read_bytes()
    find, put = partial(full.best, KEY), partial(full.put, make("unroll m"))
    assert told_once("was corrupt", partial(use, full), find, put)[2]
    assert "unroll m" in {record.schedule for record in full.records(KEY)}
    assert Path(f"{full.path}.corrupt").read_bytes() == spoiled
    assert integrity(full.path) == "ok"


def any_bit(path: Path, positions: Iterator[int]) -> None:
    """With a bit of any byte flipped, a cache is used, or is moved aside, or is none: nothing else is raised."""
    good = path.read_bytes()
    for position in positions:
        bit = 1 << position % 8 if position % 3 else 0x80  # the highest makes text that is not UTF-8
        path.write_bytes(good[:position] + bytes([good[position] ^ bit]) + good[position + 1:])
        cache = ScheduleCache(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            for use in USES.values(): use(cache)
            with contextlib.suppress(CacheError): cache.prune()
        for file in path.parent.glob(f"{path.name}*"): file.unlink()


def test_a_flipped_bit_in_the_text_of_the_schema(path: Path) -> None:
    """Python's sqlite3 cannot decode what SQLite says of a name that is not UTF-8."""
    ScheduleCache(path).put(make())
    data = path.read_bytes()
    at = data.index(b"PRIMARY KEY (") + len(b"PRIMARY KEY (problem, layout, t")
    path.write_bytes(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1:])
    cache = ScheduleCache(path)
    assert told_once("was corrupt", partial(cache.best, KEY), partial(cache.put, make())) == [None, True]
    assert Path(f"{path}.corrupt").exists()


def test_a_flipped_bit_anywhere(path: Path) -> None:
    ScheduleCache(path).put(make())
    any_bit(path, iter(random.Random(0).sample(range(path.stat().st_size), 20)))


@pytest.mark.slow
def test_a_flipped_bit_in_any_byte_of_the_schema(path: Path) -> None:
    ScheduleCache(path).put(make())
    any_bit(path, iter(range(path.read_bytes().index(b"CREATE TABLE"), 4096)))  # to the end of the first page


def test_an_empty_file_is_a_new_cache(path: Path) -> None:
    path.touch()
    cache = ScheduleCache(path)
    assert cache.best(KEY) is None
    assert cache.put(make())
    assert cache.best(KEY) is not None


def test_the_journal_of_a_corrupt_file_does_not_spoil_the_new_one(full: ScheduleCache) -> None:
    full.path.write_bytes(b"rubbish" * 9999)
    journal = Path(f"{full.path}-journal")
    journal.write_bytes(bytes.fromhex("d9d505f920a163d7") + bytes(5000))
    with pytest.warns(CacheWarning, match="was corrupt"):
        full.put(make())
    assert len(full.records(KEY)) == 1
    assert integrity(full.path) == "ok"


def test_a_file_that_another_process_has_replaced_is_not_moved(full: ScheduleCache) -> None:
    full._database._move_aside(sqlite3.DatabaseError("seen a moment ago"))
    assert not Path(f"{full.path}.corrupt").exists()
    assert len(full.records(KEY)) == 300


@pytest.mark.parametrize(
    ("statement", "why"),
    [("CREATE TABLE candidates (mine)", "another program's database"),
     ("PRAGMA user_version = 9", "has tables of version 9; this convsched uses 1")],
)  # fmt: skip
def test_another_programs_database_is_left_alone(path: Path, statement: str, why: str) -> None:
    if "user_version" in statement:
        ScheduleCache(path).put(make())
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()
    before = path.read_bytes()
    cache = ScheduleCache(path)
    assert told_once(why, partial(cache.best, KEY), partial(cache.put, make())) == [None, False]
    assert path.read_bytes() == before
    for refused in (lambda: cache.prune(), lambda: cache.export(path.with_name("x"))):
        with pytest.raises(CacheError):
            refused()


def test_another_programs_wal_is_left_alone(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE mine (x)")
        db.executemany("INSERT INTO mine VALUES (?)", [("x" * 5000,)] * 50)  # not in the file itself yet
        told_once("another program's database", partial(ScheduleCache(path).put, make()))
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("SELECT count(*) FROM mine").fetchone()[0] == 50
    assert not Path(f"{path}.corrupt").exists()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[str], str] | str]]:
    """What happens to each new connection: changes of its URI, and statements it starts with."""
    changes: list[Callable[[str], str] | str] = []
    real = sqlite3.connect

    def changed(file: str, **options: Any) -> sqlite3.Connection:
        for change in changes:
            file = change(str(file)) if callable(change) else file
        db: sqlite3.Connection = real(file, **options)
        for change in changes:
            if isinstance(change, str): db.execute(change)
        return db

    monkeypatch.setattr(database.sqlite3, "connect", changed)
    yield changes
    changes.clear()


def unwritable_is_no_cache(cache: ScheduleCache, why: str) -> None:
    """Reads go on, writes warn once, and what was asked for by name raises."""
    before = cache.path.read_bytes()
    put, mark = partial(cache.put, make("unroll m", 0.1)), partial(cache.mark_run, KEY, True, "10s", 3, 1.0)
    assert told_once(why, put, put, mark) == [False, False, False]
    hit = cache.best(KEY)
    assert hit is not None
    assert hit.record.schedule == "unroll c0"
    lines = cache.path.with_name("lines")
    with pytest.raises(CacheError, match=why):
        cache.import_(lines)
    assert cache.path.read_bytes() == before
    assert integrity(cache.path) == "ok"


def test_a_read_only_file(full: ScheduleCache, connect: list[Any]) -> None:
    connect.append(lambda uri: uri.replace("mode=rwc", "mode=ro").replace("mode=rw", "mode=ro"))
    lines = full.path.with_name("lines")
    lines.write_text(make("unroll r").to_json())
    unwritable_is_no_cache(full, "attempt to write a readonly database")


def test_a_full_disk(full: ScheduleCache, connect: list[Any]) -> None:
    with contextlib.closing(sqlite3.connect(full.path)) as db:
        db.execute("VACUUM")  # no page is free
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    connect.append(f"PRAGMA max_page_count = {pages}")
    big = [make(f"unroll x{i}") for i in range(100)]
    full.path.with_name("lines").write_text("".join(f"{record.to_json()}\n" for record in big))
    for i in range(100):  # the last page may have room for some
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            if not full.put(make(f"unroll y{i}", 500.0)):
                break
    fresh = ScheduleCache(full.path)
    before = len(fresh.records(KEY))
    assert not all(told_once("database or disk is full", *(partial(fresh.put, record) for record in big)))
    with pytest.raises(CacheError, match="full"):
        fresh.import_(full.path.with_name("lines"))
    hit = fresh.best(KEY)
    assert hit is not None
    assert len(fresh.records(KEY)) >= before
    connect.clear()
    assert fresh.put(make("unroll z"))  # there is room again
    assert integrity(full.path) == "ok"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ScheduleCache(tmp_path / "file" / "schedules.sqlite")
    assert cache.best(KEY) is None
    put = partial(cache.put, make())
    assert told_once("there is no schedule cache", put, put) == [False, False]


def test_a_folder_in_the_files_place(path: Path) -> None:
    path.mkdir()
    cache = ScheduleCache(path)
    find, put = partial(cache.best, KEY), partial(cache.put, make())
    assert told_once("unable to open database file", find, put) == [None, False]


def test_a_corrupt_file_that_cannot_be_moved(full: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    full.path.write_bytes(b"rubbish" * 9999)
    monkeypatch.setattr(database.os, "replace", refuse)
    assert told_once("cannot be moved aside", partial(full.best, KEY), full.entries) == [None, ()]
    assert "cannot be moved aside" in full.explain_miss(KEY)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise cache_module.MachineError("this user has no home folder; set CONVSCHED_CACHE to a folder")

    monkeypatch.setattr(cache_module, "cache_folder", homeless)
    cache = ScheduleCache()
    find, put = partial(cache.best, KEY), partial(cache.put, make())
    assert told_once("set CONVSCHED_CACHE", find, put) == [None, False]
    assert "set CONVSCHED_CACHE" in cache.explain_miss(KEY)


def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that each try would wait for a lock; none does."""
    found: list[float] = []
    real: Callable[..., sqlite3.Connection] = sqlite3.connect

    def connect(file: str, *, timeout: float, **options: Any) -> sqlite3.Connection:
        found.append(timeout)
        return real(file, timeout=0.0, **options)

    monkeypatch.setattr(database.sqlite3, "connect", connect)
    return found


def test_a_lock_is_waited_for_once_a_process(full: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever object asks; who has more patience waits for the rest of it; then anew for the next lock."""
    holder = sqlite3.connect(full.path, isolation_level=None)
    with contextlib.closing(holder):
        found = waits(monkeypatch)
        for lock in (1, 2):
            holder.execute("BEGIN EXCLUSIVE")
            found.clear()
            for expected in (0.3, 0.0, 0.0):
                fresh = ScheduleCache(full.path, patience=0.3)
                assert told_once("database is locked", partial(fresh.best, KEY), partial(fresh.records, KEY))
                assert sum(found) == pytest.approx(expected)
                found.clear()
            patient = ScheduleCache(full.path)
            assert told_once("database is locked", partial(patient.put, make()), partial(patient.put, make()))
            assert sum(found) == pytest.approx(database.PATIENCE_SECONDS - 0.3)
            holder.execute("ROLLBACK")
            assert ScheduleCache(full.path, patience=0.3).best(KEY) is not None, lock


def test_compile_waits_for_a_lock_less_than_a_second_in_all(
    monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.setenv("CONVSCHED_CACHE", str(path.parent))
    ScheduleCache().put(make())
    layers = [Conv2d(1, 1 + i, 1, input_size=2) for i in range(5)]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        found = waits(monkeypatch)
        for layer in layers:
            with pytest.warns(CacheWarning, match="database is locked"):
                cs.compile(layer, threads=1)
    assert 0 < sum(found) < 1


def test_a_pipe_in_the_files_place(path: Path) -> None:
    """To read it would wait for ever."""
    os.mkfifo(path)
    cache = ScheduleCache(path)
    assert told_once("is a pipe; give the path", partial(cache.best, KEY), partial(cache.put, make())) == [None, False]


def test_a_write_that_is_interrupted_leaves_nothing(full: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str:
        store(*_)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    store = cache_module._store
    monkeypatch.setattr(cache_module, "_store", interrupt)
    with pytest.raises(KeyboardInterrupt):
        full.put(make("unroll m"))
    monkeypatch.undo()
    assert "unroll m" not in {record.schedule for record in full.records(KEY)}
    assert full.put(make("unroll m"))


def test_a_copied_file_is_a_cache(full: ScheduleCache, tmp_path: Path) -> None:
    copy = tmp_path / "copy ?#%20.sqlite"  # and a name that is no URI as it stands
    shutil.copy(full.path, copy)
    assert ScheduleCache(copy).records(KEY) == full.records(KEY)
