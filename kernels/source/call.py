"""Calling a bound kernel from a user's ``@numba.njit`` function: by address, without the interpreter."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as llvm_ir
import numba
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from convsched.kernels.run.bound import Native


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


def _is_float32_in_order(array: Any) -> bool:
    """Whether an array is C-contiguous float32: known from its type, but for slices."""
    raise NotImplementedError("for compiled code")


@overload(_is_float32_in_order)
def _choose_check(array: Any) -> Any:
    def never(array: Any) -> bool:
        return False

    def always(array: Any) -> bool:
        return True

    def by_strides(array: Any) -> bool:
        step = array.itemsize
        for axis in range(array.ndim - 1, -1, -1):
            if array.strides[axis] != step and array.shape[axis] > 1:
                return False
            step *= array.shape[axis]
        return True

    if not isinstance(array, types.Array) or array.dtype != types.float32:
        return never
    return always if array.layout == "C" else by_strides


def _refuse_read_only(out: Any) -> None:
    """An output is written to: its type must allow that."""
    raise NotImplementedError("for compiled code")


@overload(_refuse_read_only)
def _check_mutable(out: Any) -> Any:
    def fine(out: Any) -> None:
        pass

    if isinstance(out, types.Array) and not out.mutable:
        raise TypingError(f"out is read-only ({out}): give an array that can be written, such as out.copy()")
    return fine


def _clear_tail(out: Any, last_block: int) -> None:
    """Zero the channels of a blocked output that no map owns."""
    raise NotImplementedError("for compiled code")


@overload(_clear_tail)
def _choose_clear(out: Any, last_block: int) -> Any:
    def nothing(out: Any, last_block: int) -> None:
        pass

    def clear(out: Any, last_block: int) -> None:
        out[:, -1, :, :, last_block:] = 0

    return clear if isinstance(out, types.Array) and out.ndim == 5 else nothing


@numba.njit(nogil=True)
def call(native: Native, x: Any, out: Any) -> None:
    """Run ``conv.native`` of a bound kernel on C-contiguous float32 arrays of its shapes, on one thread.

    For layers without a residual. Raises ValueError for other arrays; a read-only ``out`` is a TypingError,
    as it is in Numba. Not to be called by two threads at once with the same ``native``.
    """
    _refuse_read_only(out)
    if x.shape != native.x_shape or out.shape != native.y_shape:
        raise ValueError("x or out does not have the kernel's shape: give native.x_shape and native.y_shape")
    if not _is_float32_in_order(x) or not _is_float32_in_order(out):
        raise ValueError("x or out is not C-contiguous float32: give np.ascontiguousarray(x, np.float32)")
    if x.ctypes.data % 4 or out.ctypes.data % 4:
        raise ValueError("x or out is not aligned to 4 bytes: give a copy")
    if native.z_slot >= 0:
        raise ValueError("the layer has a residual, which compiled code cannot pass: call the bound kernel from Python")
    if x.ctypes.data < out.ctypes.data + 4 * out.size and out.ctypes.data < x.ctypes.data + 4 * x.size:
        raise ValueError("out overlaps x; give it memory of its own")
    native.table[native.x_slot] = x.ctypes.data
    native.table[native.y_slot] = out.ctypes.data
    for address in native.stages:
        _call_stage(address, native.table.ctypes.data)  # type: ignore[call-arg]
    _clear_tail(out, native.last_block)
