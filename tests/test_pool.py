"""The threads that run a stage's shares: errors, interrupts, forks, the end of the interpreter, no threads to have."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from convsched.kernels.run import pool

WAIT = 60  # seconds until a test that hangs fails


class Work:
    """Tasks that say when they begin and end, and take a moment."""

    def __init__(self, count: int) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.tasks = [partial(self._run, i) for i in range(count)]

    def _run(self, i: int) -> None:
        self.begun.append(i)
        time.sleep(0.0005)
        self.ended.append(i)

    def check(self, *, whole: bool) -> None:
        """Each task ran at most once, none runs now, and if `whole` all ran."""
        assert sorted(self.begun) == sorted(self.ended)
        assert len(set(self.begun)) == len(self.begun)
        assert not whole or sorted(self.begun) == list(range(len(self.tasks)))


def run(count: int) -> None:
    """A launch that must be whole."""
    work = Work(count)
    pool.run_all(work.tasks)
    work.check(whole=True)


def python(code: str) -> str:
    """What a new process prints that runs the code; an error there, or to hang, fails the test."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_task_runs_once(count: int) -> None:
    for _ in range(5):
        run(count)


def test_tasks_run_at_once() -> None:
    """Each waits for the others: neither the caller nor a lock serialises them."""
    together = threading.Barrier(3)
    pool.run_all([partial(together.wait, WAIT)] * 3)


def test_callers_share_the_threads() -> None:
    """Several at once, each with more tasks than there may be idle threads."""
    done: list[int] = []
    callers = [threading.Thread(target=lambda: (run(4), done.append(1))) for _ in range(8)]
    for caller in callers: caller.start()
    for caller in callers: caller.join(WAIT)
    assert len(done) == len(callers)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_error_is_raised_when_all_that_have_begun_have_ended(which: int) -> None:
    """Until then they write to the caller's arrays."""
    together = threading.Barrier(3)
    ended: list[int] = []

    def work(i: int) -> None:
        together.wait(WAIT)
        if i == which:
            raise ValueError(f"task {i}")
        time.sleep(0.02)
        ended.append(i)

    with pytest.raises(ValueError, match=f"task {which}"):
        pool.run_all([partial(work, i) for i in range(3)])
    assert sorted(ended) == [i for i in range(3) if i != which]
    run(3)


# Interrupts

def interrupted(tasks: list[Any], moments: Iterator[bool]) -> bool:
    """Whether an interrupt arrived in a launch: at the bytecodes of the pool's own code where `moments` says so."""
    came = False

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal came
        if frame.f_code.co_filename != pool.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(moments):
            came = True
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        pool.run_all(tasks)
    except KeyboardInterrupt:
        assert came
    finally:
        sys.settrace(before)
    return came


def test_an_interrupt_at_any_bytecode_leaves_nothing_running() -> None:
    """It is raised, what has begun has ended, what has not never begins, and the next launch is whole."""
    pool.run_all(Work(3).tasks)  # the threads are there
    number = 0
    while True:
        work, at = Work(3), number
        if not interrupted(work.tasks, (i == at for i in range(1 << 30))):
            work.check(whole=True)
            break
        work.check(whole=False)
        run(3)
        work.check(whole=False)
        number += 1
    assert number > 50


SIGNALS = """
import random, signal, threading, time
from functools import partial
from convsched.kernels.run import pool
signal.signal(signal.SIGALRM, signal.default_int_handler)
chance, caught = random.Random(0), 0
for trial in range(TRIALS):
    begun, ended = [], []
    def work(i):
        mine = threading.current_thread() is not threading.main_thread()  # there it is Python code that is interrupted
        if mine: begun.append(i)
        time.sleep(0.0003)
        if mine: ended.append(i)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + chance.random() * 6e-4)
        pool.run_all([partial(work, i) for i in range(4)])
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        caught += 1
        assert len(set(begun)) == len(begun) and set(begun) == set(ended), (begun, ended)
    pool.run_all([partial(int)] * 4)
assert caught, "no interrupt came"
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the signals of Unix")
def test_signals_leave_the_threads_working() -> None:
    assert python(f"TRIALS = 300\n{SIGNALS}") == "done"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the signals of Unix")
def test_thousands_of_signals_leave_the_threads_working() -> None:
    assert python(f"TRIALS = 20_000\n{SIGNALS}") == "done"


# Where there are no threads

def test_a_system_without_threads_runs_all_in_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "start_new_thread", refuse)
        patch.setattr(pool, "_count", 0)
        ran: list[int] = []
        pool.run_all([lambda: ran.append(threading.get_ident())] * 5)
        assert ran == [threading.get_ident()] * 5
        assert pool._queue.empty()
    run(5)


def test_a_system_with_too_few_threads_uses_those(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = pool.start_new_thread, list[int]()

    def start_two(*arguments: Any) -> int:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(pool, "start_new_thread", start_two)
    monkeypatch.setattr(pool, "_count", 0)
    run(6)
    assert len(started) == pool._count == 2


USE = """
import atexit, sys, threading, time
from convsched.kernels.run import pool
def use(end="", tasks=3, run_all=pool.run_all, sleep=time.sleep):
    ran = []
    run_all([lambda: (sleep(0.001), ran.append(1))] * tasks)
    print(len(ran), end=end, flush=True)
class Last:
    def __del__(self, use=use, is_finalizing=sys.is_finalizing):
        assert is_finalizing()
        use()
"""
ENDS = {
    "a thread that outlives main": "def late():\n    threading.main_thread().join(); time.sleep(0.05); use()\n"
                                   "threading.Thread(target=late).start()",
    "a handler of atexit": "atexit.register(use)",
    "more threads in a handler of atexit": "use('then '); atexit.register(use, tasks=7)",
    "a finaliser of the last hour": "last = Last()",
    "the same with threads": "use('then '); last = Last()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_launch_while_the_interpreter_ends(end: str) -> None:
    expected = {"more threads in a handler of atexit": "3then 7", "the same with threads": "3then 3"}.get(end, "3")
    assert python(USE + ENDS[end]) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("held", [False, True])
def test_a_forked_child_has_threads_of_its_own(held: bool, tmp_path: Path) -> None:
    """Also when another thread of the parent holds the pool's lock at that moment."""
    assert python(f"""{USE}
import os
use(' ')
taken, free = threading.Event(), threading.Event()
def hold():
    with pool._lock:
        taken.set()
        free.wait(30)
if {held}:
    threading.Thread(target=hold).start()
    taken.wait(30)
child = os.fork()
if child == 0:
    use(' ')
    os._exit(pool._count != 2)
free.set()
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
use(' ')
print(status)
""") == "3 3 3 0"
