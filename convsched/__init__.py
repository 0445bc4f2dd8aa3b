"""convsched: a convolution compiler for CPUs. ``compile(layer)`` gives a kernel; see the README."""

from __future__ import annotations

from typing import Any

from convsched.api import compile, compile_each
from convsched.errors import ConvschedError
from convsched.lazy import importing
from convsched.machine import Machine
from convsched.problem import Conv2d, Linear
from convsched.schedule import Schedule, parse_schedule

__all__ = ["Conv2d", "ConvschedError", "Linear", "Machine", "Schedule", "call", "compile", "compile_each",
           "parse_schedule", "tune"]


def __getattr__(name: str) -> Any:
    """``call`` needs Numba, which takes longer to import than everything else together; ``tune`` the tuner."""
    if name == "call":
        with importing:
            from convsched.kernels.source.call import call
        return call
    if name == "tune":
        with importing:
            from convsched.autotune.search.tune import tune
        return tune
    raise AttributeError(f"module 'convsched' has no attribute {name!r}")
