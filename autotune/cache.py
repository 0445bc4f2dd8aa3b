"""The schedule cache: every measured candidate in one SQLite file, and the best of them for a key.

A row is a record's JSON line beside the columns that name the candidate. The two must agree, and every text
must read back as itself: a row that does not is a miss with a warning that says why. Rows of another format
stay for the convsched that wrote them.

Writing is durable at once: a rollback journal, which unlike WAL needs no shared memory and leaves the file
readable where nothing can be written, synced in full. Each call opens the file anew, so that threads, forks
and another process that moves a corrupt file aside do no harm. A cache that cannot be used is no cache: what
compiles or tunes gets one warning and goes on; `export`, `import_` and `prune` raise CacheError.
"""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from convsched.autotune.record import (
    FORMAT,
    KEY,
    REGIMES,
    SCHEDULE_FORMAT,
    TIERS,
    CacheError,
    CacheWarning,
    Key,
    MachineKey,
    Record,
    Regime,
    Run,
    Tier,
    choose,
    parse_line,
)
from convsched.errors import ConvschedError, MachineError
from convsched.machine import cache_folder

Keep = Literal["winners", "ok", "all"]
Row = tuple[Any, ...]  # the columns of CANDIDATE, then the record's line
T = TypeVar("T")

PATIENCE = 10.0  # seconds that one try waits for another process's lock
TRIES = 3

CANDIDATE = (*KEY, "algorithm", "schedule")
_APPLICATION, _SCHEMA = 0x636F6E76, 1  # SQLite's application_id ("conv") and user_version
_CREATE = (
    f"CREATE TABLE candidates ({', '.join(CANDIDATE)}, record, PRIMARY KEY ({', '.join(CANDIDATE)}))",
    f"CREATE TABLE runs ({', '.join(KEY)}, run, PRIMARY KEY ({', '.join(KEY)}))",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_SCHEMA}",
)
_MACHINE = KEY.index("machine")
_SELECT = f"SELECT {', '.join(CANDIDATE)}, record FROM candidates"
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class Hit(NamedTuple):
    """A record that was found, and how near the machine is that it was measured on."""

    record: Record
    tier: Tier


class Counts(NamedTuple):
    """What an import did with its lines; skipped are those that are there already, or newer."""

    added: int
    updated: int
    skipped: int


class Pruned(NamedTuple):
    """Candidates removed and kept, and the bytes of the file after."""

    removed: int
    kept: int
    bytes: int


@dataclass(frozen=True)
class Entry:
    """All of one key: its hot winner, its default's hot seconds, how many candidates ended with each
    status, and its latest run. Candidates that cannot be read count as "unreadable"."""

    key: Key
    winner: Record | None
    default: float | None
    statuses: Mapping[str, int]
    run: Run | None

    @property
    def candidates(self) -> int:
        return sum(self.statuses.values())

    @property
    def complete(self) -> bool | None:
        """Whether tuning came to its end; None where no run is known."""
        return self.run.complete if self.run else None


class _NothingError(Exception):
    """There is no file yet, or it has no tables."""


class ScheduleCache:
    """The schedules measured so far, in `path` (default: schedules.sqlite in the folder of the caches)."""

    def __init__(self, path: Path | None = None) -> None:
        self._told: set[str] = set()
        self._patience, self._nowhere = PATIENCE, ""
        try:
            self.path = Path(path or cache_folder() / "schedules.sqlite").absolute()
        except MachineError as error:
            self.path, self._nowhere = Path(os.devnull), str(error)

    def put(self, record: Record) -> bool:
        """Keep a record, durably, unless a newer one of its candidate is there; whether the cache could be
        written. Raises CacheError for a record that would not read back."""
        record.check()
        return self._keep(lambda db: _store(db, record))

    def mark_run(self, key: Key, complete: bool, budget: str, tried: int, time: float) -> bool:
        """Keep how a key's latest tuning run ended, at Unix second `time`; whether it could be written."""
        run = Run(**vars(key), complete=complete, budget=budget, tried=tried, time=time)
        return self._keep(lambda db: _store(db, run))

    def run_of(self, key: Key) -> Run | None:
        """The latest tuning run of exactly this key."""
        with self._unused() as unused:
            return self._runs(unused).get(key)

    def records(self, key: Key) -> tuple[Record, ...]:
        """All records of exactly this key, the oldest first."""
        with self._unused() as unused:
            rows = self._rows({name: getattr(key, name) for name in KEY})
            return tuple(sorted(_readable(rows, unused), key=lambda record: (record.time, record.schedule)))

    def best(self, key: Key, *, regime: Regime = "hot", furthest: Tier = "same isa",
             check: Callable[[Record], object] | None = None) -> Hit | None:  # fmt: skip
        """The schedule to use for a key: of the nearest machine that has any, the best by `choose`.

        `furthest` bounds how unlike that machine may be. `check` may raise a ConvschedError for a record
        that no longer fits (its schedule does not apply): it counts as missing, and the next is tried.
        """
        here = MachineKey.parse(key.machine)
        with self._unused() as unused:
            rows = self._rows({name: getattr(key, name) for name in KEY if name != "machine"})
            for tier, machine in _nearest(here, {row[_MACHINE] for row in rows}, unused):
                if TIERS.index(tier) > TIERS.index(furthest) or tier == "none":
                    break
                there = [row for row in rows if row[_MACHINE] == machine]
                records = _readable(there, unused, check=False)  # of the texts: only the best one's
                while record := choose(records, regime):
                    try:
                        record.check()
                        if check is not None: check(record)
                    except ConvschedError as error:
                        unused.append(f"{record.key.text}: {str(error).splitlines()[0]}")
                        records.remove(record)
                    else:
                        return Hit(record, tier)
        return None

    def entries(self) -> tuple[Entry, ...]:
        """Every key and what is known of it, in order; keys of other formats have no winner."""
        with self._unused() as unused:
            runs, found = self._runs(unused), []
            for values, rows in groupby(self._rows({}), lambda row: row[:len(KEY)]):
                try:
                    key = Key(**dict(zip(KEY, values, strict=True)))
                except CacheError as error:
                    unused.append(str(error))
                    continue
                found.append(_entry(key, list(rows), runs.get(key), unused))
            return tuple(found)

    def explain_miss(self, key: Key) -> str:
        """Why there is no schedule for a key: the nearest entries and what differs, for people."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CacheWarning)
            fresh = copy(self)
            fresh._told = set()  # tells again what this one has told already
            hit, entries = fresh.best(key), fresh.entries()
        if hit:
            lines = [f"a hit, from {hit.tier} machine: {hit.record.algorithm}, {hit.record.schedule}"]
        else:
            near = sorted(_difference(entry, key) for entry in entries)[:3]
            lines = [f"no schedule for {key.text}", *(f"  {text}" for _, text in near)]
            lines += [] if near else [f"  {self.path} has no entries"]
        return "\n".join([*lines, *dict.fromkeys(str(warning.message) for warning in caught)])

    def export(self, path: Path) -> int:
        """Write all candidates and runs of this format as JSON lines, the file whole or not at all; how many
        candidates."""
        with self._unused() as unused:
            rows = self._rows({"format": FORMAT, "compiler": SCHEDULE_FORMAT}, strict=True)
            lines = [record.to_json() for record in _readable(rows, unused)]
            runs = [run.to_json() for run in self._runs(unused).values()]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines + runs)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise CacheError(f"{path}: {error.strerror}") from error
        finally:
            with suppress(OSError): temporary.unlink()
        return len(lines)

    def import_(self, path: Path) -> Counts:
        """Add what `export` wrote, all lines or none. Raises CacheError with the number of a line that cannot
        be used."""
        found: list[Record | Run] = []
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                found.append(parse_line(line))
        except CacheError as error:
            raise CacheError(f"{path}, line {len(found) + 1}: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise CacheError(f"{path}: {error}") from error

        def store(db: sqlite3.Connection) -> Counts:
            done = Counter(_store(db, item, again=False) for item in found)
            return Counts(*(done[name] for name in Counts._fields))

        return self._attempt(store, write=True)

    def prune(self, keep: Keep = "winners", older_than: float | None = None, max_bytes: int | None = None) -> Pruned:
        """Remove candidates: but the winners, hot and cold, and the defaults ("winners"), or the failures
        ("ok"), or none ("all"); those measured before Unix second `older_than`; those of other formats or
        unreadable; then the oldest, winners last, until the file is within `max_bytes`."""
        if keep not in get_args(Keep):
            raise CacheError(f"keep={keep!r}: use one of {', '.join(get_args(Keep))}")
        rows = self._rows({}, strict=True)
        if not rows and not self.path.exists():
            return Pruned(0, 0, 0)
        winners, kept = set[Record](), list[Record]()
        for _, group in groupby(_readable(rows, []), lambda record: record.key):
            records = list(group)
            best = {choose(records, regime) for regime in REGIMES} - {None}
            winners |= {record for record in records if record in best or record.is_default}
            kept += [record for record in records if keep == "all" or record in winners
                     or (keep == "ok" and record.status == "ok")]  # fmt: skip
        kept = [record for record in kept if older_than is None or record.time >= older_than]
        kept.sort(key=lambda record: (record in winners, record.time))
        size = self._rewrite(rows, kept)
        while max_bytes is not None and size > max_bytes and kept:
            kept = kept[max(1, int(len(kept) * (1 - max_bytes / size))):]
            size = self._rewrite(rows, kept)
        return Pruned(len(rows) - len(kept), len(kept), size)

    def _rewrite(self, rows: list[Row], kept: list[Record]) -> int:
        """Delete those of the rows that are not kept, and runs without candidates; the file's size after."""
        names = {_columns(record) for record in kept}
        where = " AND ".join(f"{column} IS ?" for column in CANDIDATE)
        match = " AND ".join(f"candidates.{column} IS runs.{column}" for column in KEY)

        def delete(db: sqlite3.Connection) -> None:
            gone = [row[:-1] for row in rows if row[:-1] not in names]
            db.executemany(f"DELETE FROM candidates WHERE {where}", gone)
            db.execute(f"DELETE FROM runs WHERE NOT EXISTS (SELECT 1 FROM candidates WHERE {match})")

        self._attempt(delete, write=True)
        with suppress(sqlite3.Error), closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("VACUUM")  # needs room for a copy: on a full disk, the file keeps its size for now
        return self.path.stat().st_size

    def _rows(self, where: Mapping[str, object], strict: bool = False) -> list[Row]:
        """The rows with these columns, in order of the key; nothing, and a warning, if there is no cache."""
        condition = " AND ".join(f"{column} = ?" for column in where) or "1"
        query = f"{_SELECT} WHERE {condition} ORDER BY {', '.join(CANDIDATE)}"
        return self._read(lambda db: db.execute(query, tuple(where.values())).fetchall(), [], strict)

    def _runs(self, unused: list[str]) -> dict[Key, Run]:
        runs, empty = dict[Key, Run](), list[Row]()
        query = f"SELECT run FROM runs WHERE format = {FORMAT}"
        for row in self._read(lambda db: db.execute(query).fetchall(), empty):
            try:
                run = Run.from_json(row[0])
                runs[run.key] = run
            except CacheError as error:
                unused.append(f"a run {error}")
        return runs

    @contextmanager
    def _unused(self) -> Iterator[list[str]]:
        """Collects why rows are not used, and warns once of all."""
        unused: list[str] = []
        yield unused
        if unused:
            more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
            self._tell(f"rows of {self.path} are not used: {unused[0]}{more}")

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(CacheWarning(text), stacklevel=2)

    def _keep(self, action: Callable[[sqlite3.Connection], object]) -> bool:
        try:
            self._attempt(action, write=True)
        except CacheError as error:
            self._tell(f"there is no schedule cache: {error}")
            return False
        return True

    def _read(self, action: Callable[[sqlite3.Connection], T], empty: T, strict: bool = False) -> T:
        try:
            return self._attempt(action, write=False)
        except _NothingError:
            return empty
        except CacheError as error:
            if strict:
                raise
            self._tell(f"there is no schedule cache: {error}")
            return empty

    def _attempt(self, action: Callable[[sqlite3.Connection], T], *, write: bool) -> T:
        """The action's result, in a transaction of its own. Raises CacheError for a file that is no use."""
        if self._nowhere:
            raise CacheError(self._nowhere)
        for attempt in range(1, TRIES + 1):
            try:
                with self._opened(write) as db:
                    result = action(db)
                self._patience = PATIENCE
                return result
            except (sqlite3.Error, OSError) as error:
                code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                if attempt == TRIES:
                    if code in _BUSY: self._patience = 0.0  # the next call does not wait as long again
                    raise CacheError(f"{self.path}: {error}") from error
                if code in _CORRUPT: self._move_aside(error)
        raise AssertionError("unreachable")

    @contextmanager
    def _opened(self, write: bool) -> Iterator[sqlite3.Connection]:
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.exists():
            raise _NothingError
        uri = f"{self.path.as_uri()}?mode={'rwc' if write else 'rw'}"  # to read may mean to roll back first
        db = sqlite3.connect(uri, uri=True, timeout=self._patience, isolation_level=None)
        with closing(db):
            db.text_factory = lambda text: text.decode("utf-8", "replace")
            if write:
                _has_tables(db, self.path)  # raises before anything is changed in another program's file
                db.execute("PRAGMA journal_mode = TRUNCATE")
                db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            if _has_tables(db, self.path):
                _check_size(db, self.path)
            elif not write:
                raise _NothingError
            else:
                for statement in _CREATE: db.execute(statement)
            yield db
            db.execute("COMMIT")

    def _move_aside(self, why: BaseException) -> None:
        """Rename a corrupt file, unless another process has done so just now."""
        import fcntl

        try:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                if not _is_corrupt(self.path):
                    return
                aside = f"{self.path}.corrupt"
                for suffix in ("-journal", "-wal", "-shm", ""):  # a journal left here would spoil a new file
                    with suppress(FileNotFoundError): os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
            finally:
                os.close(folder)
        except OSError as error:
            raise CacheError(f"{self.path} is corrupt ({why}) and cannot be moved aside: {error}") from error
        self._tell(f"{self.path} was corrupt ({why}); it is now {aside}, and a new one is started")


def _has_tables(db: sqlite3.Connection, path: Path) -> bool:
    """False for an empty file. Raises CacheError for a database that is not a schedule cache."""
    if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return False
    found = tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if found[0] != _APPLICATION:
        raise CacheError(f"{path} is another program's database")
    if found[1] != _SCHEMA:
        raise CacheError(f"{path} has tables of version {found[1]}; this convsched uses {_SCHEMA}")
    return True


def _check_size(db: sqlite3.Connection, path: Path) -> None:
    """Raises for a truncated file, which SQLite would write to until it needs a page that is missing."""
    pages, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    if path.stat().st_size < pages * size:
        error = sqlite3.DatabaseError("file is truncated")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _is_corrupt(path: Path) -> bool:
    if not path.is_file():  # gone, or a device: nothing to rename
        return False
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=PATIENCE)) as db:
            db.execute("BEGIN")
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]: _check_size(db, path)
            return bool(db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok")
    except sqlite3.Error as error:
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT


def _columns(item: Record | Run) -> Row:
    """What names an item in its table."""
    return tuple(getattr(item, name) for name in (CANDIDATE if isinstance(item, Record) else KEY))


def _store(db: sqlite3.Connection, item: Record | Run, again: bool = True) -> str:
    """Add or replace an item, unless a newer one is there, or (not `again`) one as new; what was done."""
    table, column = ("candidates", "record") if isinstance(item, Record) else ("runs", "run")
    values = _columns(item)
    where = " AND ".join(f"{name} = ?" for name in (CANDIDATE if isinstance(item, Record) else KEY))
    found = db.execute(f"SELECT {column} FROM {table} WHERE {where}", values).fetchone()
    with suppress(CacheError):  # one that cannot be read is replaced
        if found and (item.time, again) < (type(item).from_json(found[0]).time, True):
            return "skipped"
    marks = ", ".join("?" * (len(values) + 1))
    db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (*values, item.to_json()))
    return "updated" if found else "added"


def _readable(rows: Sequence[Row], unused: list[str], check: bool = True) -> list[Record]:
    """The records of those rows that are as convsched wrote them; why the others are not used."""
    records = []
    for row in rows:
        try:
            record = Record.from_json(row[-1])
            if check: record.check()
            if _columns(record) != row[:-1]:
                raise CacheError("its columns are not its record's")
            records.append(record)
        except CacheError as error:
            unused.append(f"{row[0]}: {error}")
    return records


def _nearest(here: MachineKey, texts: set[str], unused: list[str]) -> list[tuple[Tier, str]]:
    """The machines with these texts, the most alike first."""
    found = []
    for text in sorted(texts):
        try:
            there = MachineKey.parse(text)
            found.append((TIERS.index(here.tier(there)), here.distance(there), text))
        except CacheError as error:
            unused.append(str(error))
    return [(TIERS[tier], text) for tier, _, text in sorted(found)]


def _entry(key: Key, rows: list[Row], run: Run | None, unused: list[str]) -> Entry:
    current = (key.format, key.compiler) == (FORMAT, SCHEDULE_FORMAT)
    records = _readable(rows, unused) if current else []
    statuses = Counter[str](record.status for record in records)
    statuses["unreadable"] += len(rows) - len(records)
    defaults = [r.hot for r in records if r.is_default and r.status == "ok" and r.hot is not None]
    return Entry(key, choose(records), min(defaults, default=None), dict(+statuses), run)


def _difference(entry: Entry, key: Key) -> tuple[int, str]:
    """How far an entry is from a key, and how it differs."""
    words = set(entry.key.problem.split()) ^ set(key.problem.split())
    other = [name for name in KEY if getattr(entry.key, name) != getattr(key, name)]
    texts = [f"other {name} ({getattr(entry.key, name)})" for name in other]
    if entry.winner is None and "unreadable" not in entry.statuses:
        texts.append("only " + ", ".join(f"{count} {status}" for status, count in entry.statuses.items()))
    return len(other) + 2 * len(words), "; ".join(texts)
