"""The object cache: machine code on disk.

A cache entry is ``digest of key and rest | length of the header | header (JSON) | object code`` in a file
named by the key. An entry that does not verify, one renamed to another key included, counts as missing.
Writers use a temporary file and a rename, so that processes can share the folder; a folder that cannot be
written means no cache. The digest finds damage, not intent: a folder or an entry that another user can write is
not used. An entry's time of change is that of its last use: beyond ``LIMIT_BYTES`` the entries that were not used for
longest go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm

import convsched.errors
from convsched.errors import CacheWarning, MachineError
from convsched.kernels.jit import target
from convsched.machine import cache_folder
from convsched.plan.plan import Plan, ProgramPlan

FORMAT = 2  # of a cache entry
LIMIT_BYTES = 256 << 20  # of all entries: some 20,000 kernels
CHECK_SUFFIX = "00"  # an entry whose key ends so has the folder's size checked: one in 256, whoever writes it

_told: set[Path] = set()  # folders that were warned of


@cache
def compiler_digest() -> str:
    """A digest of the compiler's own sources and of LLVM's version: code made by another is not reused."""
    digest = hashlib.sha256(f"{llvmlite.__version__} {llvm.llvm_version_info}".encode())
    package = Path(__file__).parent
    roots = [package, Path(convsched.errors.__file__).parent]
    for path, name in sorted((p, p.relative_to(root)) for root in roots for p in root.rglob("*.py")):
        digest.update(name.as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def object_key(plan: Plan | ProgramPlan) -> str:
    """The name of the cache entry of a plan's code: all that it depends on."""
    everything = json.dumps([FORMAT, compiler_digest(), *target(plan.target.machine), *plan.object_key])
    return hashlib.sha256(everything.encode()).hexdigest()


def _digest(key: str, payload: bytes) -> bytes:
    return hashlib.sha256(key.encode() + payload).digest()


def _folder() -> Path:
    """Where the entries are; it may not exist. Raises MachineError where there is no place for caches."""
    return cache_folder() / "objects"


def read_entry(key: str) -> tuple[dict[str, Any], bytes] | None:
    """The header and object code of a cache entry; None if there is none that verifies, or if another user could
    have written it. Warns of a folder that others can write."""
    try:
        folder = _folder()
        if not _is_ours(folder):
            return None
        path = folder / key
        data = _read(path)
        if _digest(key, data[32:]) != data[:32]:
            return None
        size = int.from_bytes(data[32:40], "little")
        header = json.loads(data[40:40 + size])
    except (OSError, MachineError, ValueError):
        return None
    with contextlib.suppress(OSError):  # it is used now; a disk that cannot be written keeps the old time
        os.utime(path)
    return (header, data[40 + size:]) if isinstance(header, dict) else None


def write_entry(key: str, header: dict[str, Any], code: bytes) -> None:
    """Write a cache entry; nothing is written, and nothing raised, where the folder is missing, not to be written,
    or open to others."""
    head = json.dumps(header).encode()
    payload = len(head).to_bytes(8, "little") + head + code
    with contextlib.suppress(OSError, MachineError):
        folder = _folder()
        for place in (folder.parent, folder):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder):
            return
        handle, temporary = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_digest(key, payload) + payload)
            os.replace(temporary, folder / key)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    if key.endswith(CHECK_SUFFIX):
        prune_entries(LIMIT_BYTES)


class Entries(NamedTuple):
    """How many entries of the object cache were removed and are kept, and the bytes of those kept."""

    removed: int
    kept: int
    bytes: int


def prune_entries(limit: int) -> Entries:
    """Remove the entries that were not used for longest, until the rest have fewer than ``limit`` bytes.

    What cannot be removed is kept; another process that prunes or writes at the same time does no harm.
    """
    entries = sorted(_entries(), reverse=True)
    newer = kept = left = 0
    for _, size, path in entries:
        newer += size
        if newer < limit or not _remove(path):
            kept, left = kept + 1, left + size
    return Entries(len(entries) - kept, kept, left)


def usage() -> tuple[int, int]:
    """How many entries the object cache has, and their bytes."""
    sizes = [size for _, size, _ in _entries()]
    return len(sizes), sum(sizes)


def _entries() -> Iterator[tuple[int, int, str]]:
    """(last use in ns, bytes, path) of each file of the folder, those that a dead writer left included."""
    try:
        with os.scandir(_folder()) as files:
            for file in files:
                with contextlib.suppress(OSError):  # another process has just removed it
                    status = file.stat(follow_symlinks=False)
                    if file.is_file(follow_symlinks=False):
                        yield status.st_mtime_ns, status.st_size, file.path
    except (OSError, MachineError):
        return


def _remove(path: str) -> bool:
    """Whether a file is gone now."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _why_open(status: os.stat_result, writers: int = stat.S_IWGRP | stat.S_IWOTH) -> str:
    """Why another user may have written what has this status, and code of it must not run; "" if none can have.
    `writers`: the bits of the mode that let others write."""
    if not hasattr(os, "geteuid"):  # no such owners and modes here
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {status.st_uid}: let CONVSCHED_CACHE name a folder of your own"
    if status.st_mode & writers:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o}): chmod go-w"
    return ""


def _is_ours(folder: Path) -> bool:
    """Whether only this user can write to the folder, and replace it; if not, this is said once."""
    above = folder.parent.stat()
    replacers = 0 if above.st_mode & stat.S_ISVTX else stat.S_IWOTH  # a sticky folder lets none rename another's
    for place, why in ((folder, _why_open(folder.stat())), (folder.parent, _why_open(above, replacers))):
        if why and folder not in _told:
            _told.add(folder)
            warnings.warn(CacheWarning(f"compiled kernels are not kept in {folder}: {place} {why}"), stacklevel=2)
        if why:
            return False
    return True


def _read(path: Path) -> bytes:
    """The bytes of a regular file that only this user can write; raises OSError for anything else.

    What was opened is looked at, not what the path may name later, and a pipe is not waited for.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or _why_open(status):
            raise OSError(f"{path} is not a file of this user's alone")
        return file.read()
