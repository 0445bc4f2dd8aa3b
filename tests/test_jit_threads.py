"""LLVM among threads, forks and many kernels: compiled at once, no lock left taken in a child, nothing left behind."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest

import convsched as cs
from convsched.kernels import jit
from convsched.lazy import cached_property
from convsched.machine import host
from convsched.problem import Conv2d

WAIT = 60  # seconds until a test that hangs fails
TEXT = "define i64 @answer() {\n  ret i64 42\n}\n"
HOST = host.machine()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSCHED_CACHE", str(tmp_path / "cache"))


def python(code: str, *arguments: str) -> str:
    """What a new process prints that runs the code; an error there, or to hang, fails the test."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True,
                          timeout=WAIT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def answer(loaded: jit.Loaded) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int64)(loaded.address("answer"))())


# Threads

def test_threads_are_in_the_code_generator_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits there until all four are: with a lock around it they would wait for ever."""
    together, original = threading.Barrier(4), jit._generated

    def generated(*arguments: Any) -> bytes:
        together.wait(WAIT)
        return original(*arguments)

    monkeypatch.setattr(jit, "_generated", generated)
    with ThreadPoolExecutor(4) as pool:
        codes = set(pool.map(lambda _: jit.compile_object(TEXT, HOST), range(4)))
    monkeypatch.undo()
    assert codes == {jit.compile_object(TEXT, HOST)}


def test_what_takes_long_does_not_take_the_lock_of_llvmlite() -> None:
    errors: list[Any] = [ctypes.c_char_p(), ctypes.c_char_p()]
    context, generator = llvm.create_context(), jit._target_machine(*jit.target(HOST))
    found: list[Any] = []

    def compile_() -> None:
        module = jit._unlocked("LLVMPY_ParseAssembly")(context, TEXT.encode(), ctypes.byref(errors[0]))
        found.append(jit._unlocked("LLVMPY_TargetMachineEmitToMemory")(generator, module, 1, ctypes.byref(errors[1])))
        found.append(module)

    with llvm.ffi.lib._lock:
        thread = threading.Thread(target=compile_)
        thread.start()
        thread.join(WAIT)
        assert len(found) == 2
    llvm.ffi.lib.LLVMPY_DisposeMemoryBuffer(found[0])
    llvm.ModuleRef(found[1], context).close()


def small(number: int) -> Conv2d:
    return Conv2d(1 + number % 3, 2 + number, 1 + number % 2, input_size=(3, 4), bias=False)


def test_layers_compiled_by_many_threads_compute_what_they_should() -> None:
    def check(number: int) -> None:
        layer = small(number)
        kernel = cs.compile(layer, threads=1, algorithm="direct")
        y = kernel(np.ones(layer.input_shape, np.float32), np.full(layer.weight_shape, number, np.float32))
        assert (y == number * layer.weights // layer.M).all()

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(check, range(24)))) == 24


def test_an_error_of_llvm_names_the_line_and_keeps_nothing() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"LLVM IR parsing error\n.*1:1: error: expected top-level entity"):
            jit.compile_object("nonsense", HOST)
    assert answer(jit.load(TEXT, ("answer",))) == 42


def test_a_lazy_property_is_computed_once_and_without_a_lock() -> None:
    """Also by two threads at once, each of which is in the computation."""
    together = threading.Barrier(2)

    class Thing:
        @cached_property
        def value(self) -> object:
            """A value."""
            together.wait(WAIT)
            return object()

    one, other = Thing(), Thing()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda thing: thing.value, (one, other))
    assert (one.value, other.value) == (first, second)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda thing: thing.value, [Thing()] * 2))
    assert both[0] is both[1]
    assert Thing.value.__doc__ == "A value."


# Forks

FORK = """
import os, signal, threading, time
import convsched as cs
from convsched.kernels import jit
from convsched.plan import plan
import llvmlite.binding as llvm
layer = cs.Conv2d(1, 2, 1, input_size=3)
inside, entered = [], threading.Event()
def busy(lock):
    with lock:
        inside.append(1); entered.set()
        time.sleep(0.2)
        inside.clear()
def fork(child, whole=True):
    assert entered.wait(30)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # ends a child that hangs
        assert not inside or not whole
        child()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
def compile(number=0):
    assert cs.compile(cs.Conv2d(1, 3 + number, 1, input_size=3), threads=1, cache=False).nest
def start(run, *arguments):
    threading.Thread(target=run, args=arguments, daemon=True).start()
"""
MEANWHILE = {
    "is in the code generator": """
original = jit._generated
def generated(*arguments):
    busy(threading.Lock())
    return original(*arguments)
jit._generated = generated
start(compile)
def child():
    jit._generated = original
    compile(1)
fork(child)
""",
    "is in LLVM": "start(lambda: busy(jit._in_llvm()))\nfork(compile)",
    "holds the lock of llvmlite": "start(busy, llvm.ffi.lib._lock)\nfork(compile)",
    "enters LLVM for the first time": "start(busy, jit._registering)\nfork(compile)",
    "applies a schedule": """
original = plan.apply
def apply(*arguments):
    inside.append(1); entered.set()
    time.sleep(2)
    return original(*arguments)
plan.apply = apply
start(compile)
def child():
    plan.apply = original
    compile(1)
fork(child, whole=False)
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_a_child_compiles_that_was_forked_while_another_thread(meanwhile: str) -> None:
    assert python(FORK + MEANWHILE[meanwhile]) == "0"


LATE = """
import os, signal, sys, threading, time
import convsched as cs
entered = threading.Event()
class Slow:
    def find_spec(self, name, *rest):
        if name == sys.argv[1]:
            entered.set()
            time.sleep(0.3)
sys.meta_path.insert(0, Slow())
def use():
    layer = cs.Conv2d(1, 2, 1, input_size=3)
    cs.compile(layer, threads=1, cache=False) if sys.argv[2] == "compile" else getattr(cs, sys.argv[2])
thread = threading.Thread(target=use)
thread.start()
assert entered.wait(30)
pid = os.fork()
if pid == 0:
    signal.alarm(30)  # ends a child that hangs
    use()
    os._exit(0)
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(("module", "use"), [
    ("convsched.kernels.run.code", "compile"), ("llvmlite.binding", "compile"), ("convsched.kernels.jit", "compile"),
    ("convsched.autotune.store.cache", "tune"), ("convsched.kernels.source.call", "call")])
def test_a_child_goes_on_that_was_forked_while_another_thread_imported(module: str, use: str) -> None:
    assert python(LATE, module, use) == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_threads_that_fork_at_once_go_on() -> None:
    assert python(f"""{FORK}
compile(); entered.set()
def forks():
    for i in range(5): fork(lambda: compile(i))
threads = [threading.Thread(target=forks) for _ in range(3)]
for thread in threads: thread.start()
for i in range(10): compile(10 + i)
for thread in threads: thread.join()
compile(99)
""").replace("\n", "") == "0" * 15  # prints of threads mix


# Memory

def test_a_linker_goes_with_the_last_of_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    made, create = list[int](), llvm.create_lljit_compiler
    monkeypatch.setattr(jit, "_linker", None)  # and back with its room, in which names are taken
    monkeypatch.setattr(jit, "_room", 0)
    monkeypatch.setattr(jit, "_linker", None)  # with its room, the one before comes back
    monkeypatch.setattr(llvm, "create_lljit_compiler", lambda: made.append(1) or create())
    code = jit.compile_object(TEXT, HOST)
    kept = [jit.link(code, ("answer",)) for _ in range(3 * jit.LIBRARIES)][jit.LIBRARIES // 2::jit.LIBRARIES]
    gc.collect()
    assert len(made) == 3
    assert [answer(loaded) for loaded in kept] == [42] * 3  # the linkers of the first two have been replaced


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_kernels_that_are_gone_leave_no_memory_taken() -> None:
    grown = python(f"""
import gc
from convsched.kernels import jit
from convsched.machine import host
code = jit.compile_object({TEXT!r}, host.machine())
def resident():
    gc.collect()
    return 4096 * int(open("/proc/self/statm").read().split()[1])
for _ in range(200): jit.link(code, ("answer",))
before = resident()
for _ in range(1600): jit.link(code, ("answer",))
print((resident() - before) / 1600)
""")
    assert float(grown) < 1024  # bytes a kernel; 9,000 where one linker links all
