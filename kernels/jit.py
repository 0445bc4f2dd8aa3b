"""LLVM IR to machine code to an address, with an object cache on disk.

The code generator runs at level 2 without IR passes: the emitter has already chosen what to unroll and keep
in registers. ORC links the object code and frees it when the last reference to it goes.

A cache entry is ``digest of key and rest | length of the header | header (JSON) | object code`` in a file
named by the key. An entry that does not verify, one renamed to another key included, counts as missing.
Writers use a temporary file and a rename, so that processes can share the folder; a folder that cannot be
written means no cache. An entry's time of change is that of its last use: beyond ``LIMIT`` bytes the entries
that were not used for longest go.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm

import convsched.errors
from convsched.errors import MachineError
from convsched.machine import Machine, cache_folder

FORMAT = 2  # of a cache entry
LIMIT = 256 << 20  # bytes of all entries: some 20,000 kernels
CHECKED = "00"  # an entry whose key ends so has the folder's size checked: one in 256, whoever writes it
_LOCK = threading.RLock()
_NUMBER = itertools.count()

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


@cache
def _target_machine(cpu: str, features: str) -> Any:
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    return triple.create_target_machine(cpu=cpu, features=features, opt=2, reloc="pic", codemodel="small")


@cache
def _linker() -> Any:
    _initialize()
    return llvm.create_lljit_compiler()


def compile_object(text: str, machine: Machine) -> bytes:
    """The object code of an LLVM module's text."""
    with _LOCK:
        return bytes(_target_machine(*target(machine)).emit_object(_parse(text)))


def assembly(text: str, machine: Machine) -> str:
    """The assembly of an LLVM module's text."""
    with _LOCK:
        return str(_target_machine(*target(machine)).emit_assembly(_parse(text)))


def _parse(text: str) -> Any:
    _initialize()
    module = llvm.parse_assembly(text)
    module.triple = llvm.get_process_triple()
    return module


@dataclass
class Loaded:
    """Linked code; the addresses stay valid as long as this object lives."""

    tracker: Any

    def address(self, symbol: str) -> int:
        """The address of an exported function."""
        return int(self.tracker[symbol])


def link(code: bytes, symbols: tuple[str, ...]) -> Loaded:
    """Link object code into the process."""
    with _LOCK:
        builder = llvm.JITLibraryBuilder().add_object_img(code)
        for symbol in symbols:
            builder.export_symbol(symbol)
        return Loaded(builder.link(_linker(), f"convsched{next(_NUMBER)}"))


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


def read_entry(key: str) -> tuple[dict[str, Any], bytes] | None:
    """The header and object code of a cache entry; None if there is none that verifies."""
    try:
        path = _folder() / key
        data = path.read_bytes()
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
    """Write a cache entry; no folder, or one that cannot be written, is no error."""
    head = json.dumps(header).encode()
    payload = len(head).to_bytes(8, "little") + head + code
    with contextlib.suppress(OSError, MachineError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
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
