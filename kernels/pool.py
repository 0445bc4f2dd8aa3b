"""Threads that run the shares of a stage; a stage ends when all have.

The native functions release the interpreter's lock, so a pool of Python threads runs them in parallel. The
pool is made when first needed and made anew in a forked child.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def run_all(tasks: Sequence[Callable[[], object]]) -> None:
    """Run the tasks at once, the first in the calling thread; returns when all are done."""
    if len(tasks) == 1:
        tasks[0]()
        return
    with _lock:
        pool = _pools.setdefault(len(tasks), ThreadPoolExecutor(len(tasks) - 1, "convsched"))
    futures = [pool.submit(task) for task in tasks[1:]]
    tasks[0]()
    for future in futures:
        future.result()
