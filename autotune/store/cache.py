"""The schedule cache: every measured candidate in one SQLite file, and the best of them for a key.

A row is a record's JSON line beside the columns that name the candidate. The two must agree, and every text
must read back as itself: a row that does not is a miss with a warning that says why. Rows of another format
stay for the convsched that wrote them.

Looking up never measures: the same file gives the same choice in every process. A cache that cannot be used
counts as none: what compiles or tunes gets one warning and goes on; `export`, `import_` and `prune` raise
CacheError.
"""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from convsched.autotune.store.database import PATIENCE_SECONDS, Database
from convsched.autotune.store.record import (
    FORMAT,
    KEY,
    REGIMES,
    SCHEDULE_FORMAT,
    CacheError,
    Key,
    Record,
    Regime,
    Run,
    other_version,
    parse_line,
)
from convsched.autotune.store.winner import choose
from convsched.errors import CacheWarning, ConvschedError, MachineError
from convsched.machine import MachineKey, Tier, cache_folder

Keep = Literal["winners", "ok", "all"]
Row = tuple[Any, ...]  # the columns of CANDIDATE, then the record's line
T = TypeVar("T")

TIERS: tuple[Tier, ...] = get_args(Tier)
CANDIDATE = (*KEY, "algorithm", "schedule")
_CREATE = (
    f"CREATE TABLE candidates ({', '.join(CANDIDATE)}, record, PRIMARY KEY ({', '.join(CANDIDATE)}))",
    f"CREATE TABLE runs ({', '.join(KEY)}, run, PRIMARY KEY ({', '.join(KEY)}))",
)
_MACHINE = KEY.index("machine")
_VERSION = ("format", "compiler")
_SELECT = f"SELECT {', '.join(CANDIDATE)}, record FROM candidates"
_DELETE = f"DELETE FROM candidates WHERE {' AND '.join(f'{name} IS ?' for name in CANDIDATE)}"


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


class ScheduleCache:
    """The schedules measured so far, in `path` (default: schedules.sqlite in the folder of the caches).

    `patience`: the seconds that this process waits for another one's lock, once, until the file is free again.
    """

    def __init__(self, path: Path | None = None, patience: float = PATIENCE_SECONDS) -> None:
        refused = ""
        try:
            self.path = Path(path or cache_folder() / "schedules.sqlite").absolute()
        except MachineError as error:
            self.path, refused = Path(os.devnull), str(error)
        self._database = Database(self.path, _CREATE, refused, patience)

    def put(self, record: Record) -> bool:
        """Keep a record, durably, unless a newer one of its candidate is there; whether the cache could be
        written. Raises CacheError for a record that would not read back."""
        record.check()
        return self._keep(lambda db: _store(db, record))

    def mark_run(self, key: Key, complete: bool, budget: str, tried: int, time: float) -> bool:
        """Keep how a key's latest tuning run ended, at Unix second `time`; whether it could be written. Raises
        CacheError for a key that would not read back."""
        run = Run(**vars(key), complete=complete, budget=budget, tried=tried, time=time)
        run.check()
        return self._keep(lambda db: _store(db, run))

    def forget(self, records: Iterable[Record]) -> bool:
        """Remove candidates, so that they are a miss; whether the cache could be written."""
        rows = [_columns(record) for record in records]
        return self._keep(lambda db: db.executemany(_DELETE, rows))

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
             accept: Callable[[Record], bool] = lambda record: True) -> Hit | None:  # fmt: skip
        """The schedule to use for a key: of the nearest machine that has any, the best by `choose`.

        `furthest` bounds how unlike that machine may be. A record for which `accept` is false is passed over: it is
        not what is asked for. For one that no longer fits (its schedule does not apply) it may raise a
        ConvschedError: the record counts as missing, with a warning.
        """
        here, version = MachineKey.parse(key.machine), (key.format, key.compiler)
        with self._unused() as unused:
            found = self._rows({name: getattr(key, name) for name in KEY if name not in ("machine", *_VERSION)})
            rows = [row for row in found if _version(row) == version]
            for tier, machine in _nearest(here, {row[_MACHINE] for row in rows}, unused):
                if TIERS.index(tier) > TIERS.index(furthest) or tier == "none":
                    break
                there = [row for row in rows if row[_MACHINE] == machine]
                records = _readable(there, unused, check=False)  # of the texts: only the best one's
                while record := choose(records, regime):
                    records.remove(record)
                    try:
                        record.check()
                        if accept(record):
                            return Hit(record, tier)
                    except ConvschedError as error:
                        unused.append(f"{record.key.text}: {str(error).splitlines()[0]}")
            if found and not rows:
                unused.append(f"{other_version(*_version(found[-1]))}; tune again")
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
            fresh = copy(self)  # which tells again what this one has told already
            fresh._database = Database(self.path, _CREATE, self._database.refused, self._database.patience)
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

        return self._database.write(store)

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
        match = " AND ".join(f"candidates.{column} IS runs.{column}" for column in KEY)

        def delete(db: sqlite3.Connection) -> None:
            db.executemany(_DELETE, [row[:-1] for row in rows if row[:-1] not in names])
            db.execute(f"DELETE FROM runs WHERE NOT EXISTS (SELECT 1 FROM candidates WHERE {match})")

        self._database.write(delete)
        return self._database.compact()

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
            self._database.warn(f"rows of {self.path} are not used: {unused[0]}{more}")

    def _keep(self, action: Callable[[sqlite3.Connection], object]) -> bool:
        try:
            self._database.write(action)
        except CacheError as error:
            self._database.warn(f"there is no schedule cache: {error}")
            return False
        return True

    def _read(self, action: Callable[[sqlite3.Connection], T], empty: T, strict: bool = False) -> T:
        try:
            return self._database.read(action, empty)
        except CacheError as error:
            if strict:
                raise
            self._database.warn(f"there is no schedule cache: {error}")
            return empty


def _version(row: Row) -> tuple[Any, ...]:
    """The format and the compiler of a row."""
    return tuple(row[KEY.index(name)] for name in _VERSION)


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
        except MachineError as error:
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
