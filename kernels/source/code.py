"""The second backend: the same scheduled nest as Python source, compiled by Numba.

Slower to compile and to run than ``Code``; it needs nothing of the LLVM emitter, which makes it a check of
that emitter and a way to read and step through what a kernel does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numba import types

from convsched.errors import LoweringError
from convsched.kernels.run.code import Code
from convsched.kernels.signature import Interface, arguments
from convsched.kernels.source.printer import load_source, source


class NumbaCode(Code):
    """A plan's source under ``numba.njit``, compiled at the first call."""

    def _load(self) -> tuple[Interface, tuple[Callable[..., None], ...]]:
        program = self.plan.program
        whole = Interface.of(program)
        parallel = len(whole.stages) == 1 and whole.is_parallel[0]
        self.function: Any = load_source(source(program), jit=True)
        sizes = [tensor.elements for tensor in arguments(program)]

        def run(table: Any, thread: int, threads: int) -> None:
            views = [np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))
                     for address, size in zip(table, sizes, strict=True)]
            self.function(*views, thread, threads)

        return replace(whole, stages=("run",), is_parallel=(parallel,)), (run,)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Raises LoweringError: what Numba compiles is called through Python."""
        raise LoweringError('native: a kernel of backend="numba" has no address; compile with backend="llvm"')

    @property
    def llvm(self) -> str:
        """The LLVM IR that Numba makes of the source."""
        return str(self.function.inspect_llvm(self._signature()))

    @property
    def assembly(self) -> str:
        """The machine code, as the assembler would read it."""
        return str(self.function.inspect_asm(self._signature()))

    def _signature(self) -> Any:
        """The types of the arguments of a call, compiled for if no call has been."""
        buffers = [types.float32[::1]] * len(self.interface.names)
        signature = (*buffers, types.int64, types.int64)
        self.function.compile(signature)
        return signature
