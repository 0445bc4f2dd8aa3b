"""One SQLite file that many processes read and write at once, whatever becomes of them or of the file.

Writing is durable at once: a rollback journal, which unlike WAL needs no shared memory and leaves the file
readable where nothing can be written, synced in full. Each transaction opens the file anew, so that threads,
forks and another process that moves a corrupt file aside do no harm. A process that dies in the middle of one
leaves a journal, by which the next reader takes it back. A corrupt file is renamed, not repaired: what is in
it can be measured again. A file of another program is never changed.
"""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from convsched.autotune.store.record import CacheError
from convsched.errors import CacheWarning

T = TypeVar("T")
Action = Callable[[sqlite3.Connection], T]

PATIENCE_SECONDS = 30.0  # to wait for other processes' locks; what is measured is worth it
TRIES = 3  # each waits for its part of them

_APPLICATION, _SCHEMA = 0x636F6E76, 1  # SQLite's application_id ("conv") and user_version
_MARKS = (f"PRAGMA application_id = {_APPLICATION}", f"PRAGMA user_version = {_SCHEMA}")
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

# What a damaged file raises: Python's sqlite3 decodes SQLite's messages, which quote names that may not be UTF-8.
_DAMAGE = (sqlite3.Error, UnicodeError)

_waited: dict[Path, float] = {}  # seconds that this process has waited for a file in vain, since it last got it


class _NothingError(Exception):
    """There is no file yet, or it has no tables."""


class Database:
    """The file at `path`, and the statements that `create` its tables; `refused` says why there can be none.

    A file that others have locked is waited for once: for `patience` seconds in all, whatever this process asks of
    it, until it can be used again.
    """

    def __init__(self, path: Path, create: Sequence[str], refused: str = "",
                 patience: float = PATIENCE_SECONDS) -> None:
        self.path, self.refused, self.patience = path, refused, patience
        self._create = create
        self._told: set[str] = set()

    def read(self, action: Action[T], empty: T) -> T:
        """The action's result, in a transaction of its own; `empty` where there are no tables yet. Raises
        CacheError for a file that cannot be read."""
        try:
            return self._attempt(action, write=False)
        except _NothingError:
            return empty

    def write(self, action: Action[T]) -> T:
        """The same for an action that changes something: all of it or nothing. Raises CacheError."""
        return self._attempt(action, write=True)

    def compact(self) -> int:
        """Give back the room of what was deleted; the file's size in bytes."""
        with suppress(*_DAMAGE), closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("VACUUM")  # needs room for a copy: on a full disk, the file keeps its size for now
        return self.path.stat().st_size

    def warn(self, text: str) -> None:
        """Warn, the first time that there is this to say."""
        if text not in self._told:
            self._told.add(text)
            warnings.warn(CacheWarning(text), stacklevel=2)

    def _attempt(self, action: Action[T], *, write: bool) -> T:
        if self.refused:
            raise CacheError(self.refused)
        for attempt in range(1, TRIES + 1):
            wait = max(0.0, self.patience - _waited.get(self.path, 0.0)) / (TRIES + 1 - attempt)
            try:
                with self._opened(write, wait) as db:
                    result = action(db)
                _waited.pop(self.path, None)
                return result
            except (*_DAMAGE, OSError) as error:
                code = _code(error)
                if code in _BUSY: _waited[self.path] = _waited.get(self.path, 0.0) + wait
                if attempt == TRIES:
                    raise CacheError(f"{self.path}: {error}") from error
                if code in _CORRUPT: self._move_aside(error)
        raise AssertionError("unreachable")

    @contextmanager
    def _opened(self, write: bool, wait: float) -> Iterator[sqlite3.Connection]:
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.exists():
            raise _NothingError
        if self.path.is_fifo():  # SQLite would wait for what is never written to it
            raise CacheError(f"{self.path} is a pipe; give the path of a file")
        uri = f"{self.path.as_uri()}?mode={'rwc' if write else 'rw'}"  # to read may mean to roll back first
        db = sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None)
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
                for statement in (*self._create, *_MARKS): db.execute(statement)
            yield db
            db.execute("COMMIT")

    def _move_aside(self, why: BaseException) -> None:
        """Rename a corrupt file, unless another process has done so just now."""
        import fcntl

        try:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                if not _is_corrupt(self.path, self.patience):
                    return
                aside = f"{self.path}.corrupt"
                for suffix in ("-journal", "-wal", "-shm", ""):  # a journal left here would spoil a new file
                    with suppress(FileNotFoundError): os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
            finally:
                os.close(folder)
        except OSError as error:
            raise CacheError(f"{self.path} is corrupt ({why}) and cannot be moved aside: {error}") from error
        self.warn(f"{self.path} was corrupt ({why}); it is now {aside}, and a new one is started")


def _has_tables(db: sqlite3.Connection, path: Path) -> bool:
    """False for an empty file. Raises CacheError for a database that is not a schedule cache."""
    if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return False
    found = tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if found[0] != _APPLICATION:
        raise CacheError(f"{path} is another program's database; give another path")
    if found[1] != _SCHEMA:
        raise CacheError(f"{path} has tables of version {found[1]}; this convsched uses {_SCHEMA}: move the file away")
    return True


def _check_size(db: sqlite3.Connection, path: Path) -> None:
    """Raises for a truncated file, which SQLite would write to until it needs a page that is missing."""
    pages, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    if path.stat().st_size < pages * size:
        error = sqlite3.DatabaseError("file is truncated")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _is_corrupt(path: Path, patience: float) -> bool:
    if not path.is_file():  # gone, or a device: nothing to rename
        return False
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=patience)) as db:
            db.execute("BEGIN")
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]: _check_size(db, path)
            return bool(db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok")
    except _DAMAGE as error:
        return _code(error) in _CORRUPT


def _code(error: Exception) -> int:
    """SQLite's primary code of an error, 0 if it is the system's; a text that is not UTF-8 comes of damage."""
    if isinstance(error, UnicodeError):
        return sqlite3.SQLITE_CORRUPT
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
