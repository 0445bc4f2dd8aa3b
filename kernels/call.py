"""Calling a bound kernel from a user's ``@numba.njit`` function: by address, without the interpreter."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as llvm_ir
import numba
from numba.core import cgutils, types
from numba.extending import intrinsic

from convsched.kernels.kernel import Native


@intrinsic
def _call_stage(typing_context: Any, address: Any, table: Any) -> Any:
    """``((void (*)(void **, int64, int64)) address)(table, 0, 1)``."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = llvm_ir.IntType(64)
        kind = llvm_ir.FunctionType(llvm_ir.VoidType(), [cgutils.voidptr_t, word, word])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        pointer = builder.inttoptr(arguments[1], cgutils.voidptr_t)
        builder.call(function, [pointer, word(0), word(1)])
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), generate


@numba.njit(nogil=True)
def call(native: Native, x: Any, out: Any) -> None:
    """Run ``conv.native`` of a bound kernel on C-contiguous float32 arrays of its shapes, on one thread.

    For layers without a residual. Raises ValueError for other shapes. Not to be called by two threads at
    once with the same ``native``.
    """
    if x.shape != native.x_shape or out.shape != native.y_shape:
        raise ValueError("x or out has a wrong shape for this kernel")
    if native.z_slot >= 0:
        raise ValueError("the layer has a residual; call it from Python")
    native.table[native.x_slot] = x.ctypes.data
    native.table[native.y_slot] = out.ctypes.data
    for address in native.stages:
        _call_stage(address, native.table.ctypes.data)  # type: ignore[call-arg]
