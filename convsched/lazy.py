"""Properties that are computed at their first use and kept, and modules that are imported at theirs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")
importing = threading.RLock()
"""Held by a function while it imports a module. A fork waits for it: a module that another thread has half imported
would stay so in the child, and whoever asks for it there would wait for ever."""


def _after_fork() -> None:
    with contextlib.suppress(RuntimeError):  # an interrupt came before it was acquired
        importing.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=importing.acquire, after_in_parent=_after_fork, after_in_child=_after_fork)


class cached_property(Generic[T]):  # noqa: N801 -- used as a decorator, in place of that of functools
    """``functools.cached_property`` without the lock that it has before Python 3.12.

    That lock is one for all instances, held while a value is computed: threads wait for each other, and a child
    forked meanwhile waits for ever. Here two threads may compute the same value, of which one is kept.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object, owner: type) -> Self | T:
        if instance is None:
            return self
        return instance.__dict__.setdefault(self.name, self.compute(instance))  # type: ignore[no-any-return]
