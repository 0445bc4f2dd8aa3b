"""The names that a call, a file and the command line share: what ``compile`` may be asked for."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Accuracy: TypeAlias = Literal["strict", "normal", "fast"]
Backend: TypeAlias = Literal["llvm", "numba"]

ACCURACIES: tuple[Accuracy, ...] = get_args(Accuracy)
BACKENDS: tuple[Backend, ...] = get_args(Backend)

INTERRUPTED_EXIT_CODE = 130
"""The exit code of a command that Ctrl-C ended: 128 + SIGINT, as shells have it."""

MAX_THREADS = 1024
"""The most threads a kernel runs on, more than the cores of all but a few machines. Threads stay once they are
made, so that a slip of the keyboard must not ask the system for a million."""
