"""Threads that run the shares of a stage; a stage ends when all have.

The native functions release the interpreter's lock, so a pool of Python threads runs them in parallel. The
pool is made when first needed and made anew in a forked child.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _renew() -> None:
    """In a forked child no thread of a pool lives on, and another thread may have held the lock."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def run_all(tasks: Sequence[Callable[[], object]]) -> None:
    """Run the tasks at once, the first in the calling thread.

    Returns when all are done, also after an error in one of them or an interrupt, which is then raised.
    """
    if len(tasks) == 1:
        tasks[0]()
        return
    with _lock:
        pool = _pools.get(len(tasks))
        if pool is None:
            pool = _pools[len(tasks)] = ThreadPoolExecutor(len(tasks) - 1, "convsched")
    try:
        futures = [pool.submit(task) for task in tasks[1:]]
    except RuntimeError:  # the system starts no more threads; what is queued must not run later
        with _lock:
            _pools.pop(len(tasks), None)
        pool.shutdown(cancel_futures=True)
        raise
    try:
        tasks[0]()
        for future in futures:
            future.result()
    except BaseException:
        _finish(futures)
        raise


def _finish(futures: Sequence[Future[object]]) -> None:
    """Wait for all, interrupted or not: until then they write to the caller's arrays."""
    try:
        wait(futures)
    except BaseException:
        _finish(futures)
        raise
