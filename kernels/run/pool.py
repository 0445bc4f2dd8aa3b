"""Threads that run the shares of a stage; a stage ends when all have.

The native functions release the interpreter's lock, so a pool of Python threads runs them in parallel. The caller
never waits for a thread that has not begun: it runs such a share itself. So a call ends where no thread can be
started, while the interpreter shuts down, and in a forked child, which begins with no threads.

An interrupt may arrive between any two bytecodes of the caller. All that is shared with the threads is therefore a
C object whose operations are whole or not at all: a queue of shares, and a lock a share, held by who runs it.
"""

from __future__ import annotations

import os
import threading
from _thread import start_new_thread
from collections.abc import Callable, Sequence
from queue import SimpleQueue

_lock = threading.RLock()  # of _count
_queue: SimpleQueue[_Share] = SimpleQueue()
_count = 0  # threads that take from the queue; they live until the process ends


class _Share:
    """One task of a launch. Who holds `lock` may run it, once; the caller takes the lock and keeps it."""

    def __init__(self, task: Callable[[], object]) -> None:
        self.task = task
        self.lock = threading.RLock()
        self.is_over = False  # run or given up
        self.error: BaseException | None = None

    def run(self) -> None:
        """In a thread of the pool: run it, unless the caller has taken it."""
        if not self.lock.acquire(False):
            return
        try:
            if not self.is_over:
                self.task()
        except BaseException as error:  # the caller raises it
            self.error = error
        finally:
            self.is_over = True
            self.lock.release()

    def join(self) -> None:
        """In the calling thread: wait for the thread that runs it, or run it here. Raises what the task raised."""
        self.lock.acquire()
        if not self.is_over:
            self.is_over = True
            self.task()
        if self.error is not None:
            raise self.error


def run_all(tasks: Sequence[Callable[[], object]]) -> None:
    """Run the tasks at once, the first in the calling thread.

    Returns when all are done. After an error in one of them or an interrupt, those that have begun are waited for,
    the others are given up, and it is raised.
    """
    if len(tasks) == 1:
        tasks[0]()
        return
    shares = [_Share(task) for task in tasks[1:]]
    if _count < len(shares):
        _grow(len(shares))
    try:
        for share in shares[:_count]:
            _queue.put(share)
        tasks[0]()
        for share in shares:
            share.join()
    except BaseException:
        _give_up(shares)
        raise


def _give_up(shares: Sequence[_Share]) -> None:
    """Let none begin, and wait for those that have, however often interrupted: they write to the caller's arrays."""
    while True:
        try:
            for share in shares:
                share.lock.acquire()
                share.is_over = True
            return
        except BaseException:  # the first interrupt is raised when all have ended
            continue


def _grow(count: int) -> None:
    """Have so many threads, or as many as the system starts."""
    global _count
    with _lock:
        while _count < count:
            try:
                start_new_thread(_work, (_queue,))
            except RuntimeError:  # no more threads, or the interpreter shuts down
                return
            _count += 1


def _work(queue: SimpleQueue[_Share]) -> None:
    while True:
        queue.get().run()


def _renew() -> None:
    """In a forked child no thread of the pool lives on, and another thread may have held the lock."""
    global _lock, _queue, _count
    _lock, _queue, _count = threading.RLock(), SimpleQueue(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
