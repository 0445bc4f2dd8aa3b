"""LLVM IR to machine code to an address, with an object cache on disk.

The code generator runs at level 2 without IR passes: the emitter has already chosen what to unroll and keep
in registers. ORC links the object code and frees it when the last reference to it goes.

Each compilation has an LLVM context and a target machine of its own, so that threads compile at once; linking, which
takes a tenth of a millisecond, has a lock. A fork waits for the threads that are in LLVM.

A cache entry is ``digest of key and rest | length of the header | header (JSON) | object code`` in a file
named by the key. An entry that does not verify, one renamed to another key included, counts as missing.
Writers use a temporary file and a rename, so that processes can share the folder; a folder that cannot be
written means no cache. The digest finds damage, not intent: a folder or an entry that another user can write is
not used. An entry's time of change is that of its last use: beyond ``LIMIT`` bytes the entries
that were not used for longest go.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import stat
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import llvmlite
import llvmlite.binding as llvm

import convsched.errors
from convsched.errors import CacheWarning, MachineError
from convsched.machine import Machine, cache_folder

FORMAT = 2  # of a cache entry
LIMIT = 256 << 20  # bytes of all entries: some 20,000 kernels
CHECKED = "00"  # an entry whose key ends so has the folder's size checked: one in 256, whoever writes it
LIBRARIES = 16  # that one linker links; to make a linker takes 1 ms, to link 0.1 ms

_told: set[Path] = set()  # folders that were warned of

_idle: dict[tuple[str, str], list[Any]] = {}  # target machines that no thread uses, by CPU and features
_linker: Any = None  # of the next libraries
_room = 0  # how many it still takes
_linking = threading.RLock()  # of the two

_own = threading.local()  # lock: the thread's; held: what it holds while it forks
_locks: WeakSet[Any] = WeakSet()  # of the threads that have been in LLVM
_registering = threading.RLock()  # of _locks

# The LLVM CPU of an instruction set that is not the host's own best, and features to be sure of. Of those with AVX-512
# one whose model orders instructions: the level x86-64-v4 has none that keeps a full register tile from spilling.
_CPU_OF_ISA = {"avx512": ("znver4", ""), "avx2": ("x86-64-v3", "+avx2,+fma,-avx512f"),
               "sse": ("x86-64", "-avx,-avx2,-avx512f")}


@cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@cache
def target(machine: Machine) -> tuple[str, str]:
    """The LLVM CPU name and features for a machine: an x86-64 level's, or the host's with AVX-512 and on
    other processors. Code for an instruction set that the host lacks can be read, not run."""
    _initialize()
    if machine.isa in _CPU_OF_ISA and (machine.isa != "avx512" or Machine.host().isa != "avx512"):
        return _CPU_OF_ISA[machine.isa]
    return str(llvm.get_host_cpu_name()), str(llvm.get_host_cpu_features().flatten())


def _target_machine(cpu: str, features: str) -> Any:
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    return triple.create_target_machine(cpu=cpu, features=features, opt=2, reloc="pic", codemodel="small")


def compile_object(text: str, machine: Machine) -> bytes:
    """The object code of an LLVM module's text. Threads that call this at once compile at once."""
    return _emitted(text, machine, is_object=True)


def assembly(text: str, machine: Machine) -> str:
    """The assembly of an LLVM module's text."""
    return _emitted(text, machine, is_object=False).decode()


def _emitted(text: str, machine: Machine, *, is_object: bool) -> bytes:
    """What the code generator makes of a text, in a context and by a target machine that no other thread uses."""
    key = target(machine)
    idle = _idle.setdefault(key, [])
    with _in_llvm():
        try:
            generator = idle.pop()
        except IndexError:
            generator = _target_machine(*key)
        try:
            with llvm.create_context() as context, _parse(text, context) as module:
                return _generated(generator, module, is_object)
        finally:
            idle.append(generator)


def _parse(text: str, context: Any) -> Any:
    with llvm.ffi.OutputString() as error:
        module = _unlocked("LLVMPY_ParseAssembly")(context, text.encode(), error)
        if error:
            raise RuntimeError(f"LLVM IR parsing error\n{error}")
    made = llvm.ModuleRef(module, context)
    made.triple = llvm.get_process_triple()
    return made


def _generated(generator: Any, module: Any, is_object: bool) -> bytes:
    lib = llvm.ffi.lib
    with llvm.ffi.OutputString() as error:
        buffer = _unlocked("LLVMPY_TargetMachineEmitToMemory")(generator, module, int(is_object), error)
        if not buffer:
            raise RuntimeError(str(error))
    try:
        return ctypes.string_at(lib.LLVMPY_GetBufferStart(buffer), lib.LLVMPY_GetBufferSize(buffer))
    finally:
        lib.LLVMPY_DisposeMemoryBuffer(buffer)


@cache
def _unlocked(name: str) -> Any:
    """A function of LLVM without the lock that llvmlite puts around each: those that take long run at once, safely
    as long as no two threads share a context or a target machine."""
    known = getattr(llvm.ffi.lib, name)
    function = getattr(ctypes.CDLL(llvm.ffi.lib._name), name)
    function.argtypes, function.restype = known.argtypes, known.restype
    return function


def _in_llvm() -> Any:
    """The calling thread's own lock, which is held for as long as it is in LLVM: what a fork waits for."""
    lock = getattr(_own, "lock", None)
    if lock is None:
        lock = threading.RLock()
        with _registering:
            _locks.add(lock)
        _own.lock = lock
    return lock


def _before_fork() -> None:
    """Wait until no other thread is in LLVM: in the child its locks would be taken, and its data half changed, for
    ever. llvmlite's own lock comes last, as it does in a thread that compiles."""
    _own.held = []
    _hold(_registering)
    for lock in [*_locks, llvm.ffi.lib._lock._lock]:
        _hold(lock)


def _hold(lock: Any) -> None:
    _own.held.append(lock)  # before it is acquired: an interrupt leaves no lock taken
    lock.acquire()


def _after_fork() -> None:
    for lock in reversed(_own.held):
        with contextlib.suppress(RuntimeError):  # an interrupt came before it was acquired
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


@dataclass
class Loaded:
    """Linked code; the addresses stay valid as long as this object lives."""

    tracker: Any

    def address(self, symbol: str) -> int:
        """The address of an exported function."""
        return int(self.tracker[symbol])


def link(code: bytes, symbols: tuple[str, ...]) -> Loaded:
    """Link object code into the process.

    LLVM keeps some 9 KB of each library, its name and symbols, until the linker goes that linked it. So each linker
    takes ``LIBRARIES``, and goes with the last kernel of them: a kernel that lives holds what its at most 15 siblings
    have left, some 300 KB, and nothing is left of kernels that are all gone.
    """
    global _linker, _room
    with _in_llvm(), _linking:
        if _linker is None or not _room:
            _initialize()
            _linker, _room = llvm.create_lljit_compiler(), LIBRARIES
        _room -= 1
        builder = llvm.JITLibraryBuilder().add_object_img(code)
        for symbol in symbols:
            builder.export_symbol(symbol)
        return Loaded(builder.link(_linker, f"convsched{_room}"))


def load(text: str, symbols: tuple[str, ...], machine: Machine | None = None) -> Loaded:
    """Compile and link an LLVM module's text."""
    return link(compile_object(text, machine or Machine.host()), symbols)


@cache
def compiler_digest() -> str:
    """A digest of the compiler's own sources and of LLVM's version: code made by another is not reused."""
    digest = hashlib.sha256(f"{llvmlite.__version__} {llvm.llvm_version_info}".encode())
    package = Path(__file__).parent
    roots = [package, Path(convsched.errors.__file__).parent]
    for path in sorted(p for root in roots for pattern in ("*.py", "lower/*.py") for p in root.glob(pattern)):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def object_key(parts: tuple[str, ...], machine: Machine) -> str:
    """The name of the cache entry of a kernel: all that its code depends on."""
    everything = json.dumps([FORMAT, compiler_digest(), *target(machine), repr(machine), *parts])
    return hashlib.sha256(everything.encode()).hexdigest()


def _digest(key: str, payload: bytes) -> bytes:
    return hashlib.sha256(key.encode() + payload).digest()


def _folder() -> Path:
    """Where the entries are; it may not exist. Raises MachineError where there is no place for caches."""
    return cache_folder() / "objects"


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
    """Write a cache entry; no folder, or one that cannot be written or that others can write, is no error."""
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
    if key.endswith(CHECKED):
        prune_entries(LIMIT)


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
