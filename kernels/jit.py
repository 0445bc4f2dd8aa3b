"""LLVM IR to machine code to an address.

The code generator runs at level 2 without IR passes: the emitter has already chosen what to unroll and keep
in registers. ORC links the object code and frees it when the last reference to it goes.

Each compilation has an LLVM context and a target machine of its own, so that threads compile at once; linking, which
takes a tenth of a millisecond, has a lock. A fork waits for the threads that are in LLVM.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import llvmlite.binding as llvm

from convsched.lazy import importing
from convsched.machine import Machine, host

LIBRARIES = 16  # that one linker links; to make a linker takes 1 ms, to link 0.1 ms

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
    if machine.isa in _CPU_OF_ISA and (machine.isa != "avx512" or host.machine().isa != "avx512"):
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
    ever. llvmlite's own lock comes last, as it does in a thread that compiles; one that imports may wait for all."""
    _own.held = []
    _hold(importing)
    _hold(_registering)
    for lock in [*_locks, llvm.ffi.lib._lock._lock]:
        _hold(lock)


def _hold(lock: Any) -> None:
    _own.held.append(lock)  # before it is acquired: an interrupt leaves no lock taken
    lock.acquire()


def _after_fork() -> None:
    for lock in reversed(getattr(_own, "held", ())):  # none if this module was imported while the fork waited for it
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
    return link(compile_object(text, machine or host.machine()), symbols)
