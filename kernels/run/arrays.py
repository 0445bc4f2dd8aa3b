"""The arrays that users pass: shapes by layout, checks with errors that say what to do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from convsched.errors import ArrayError
from convsched.problem import Problem
from convsched.problem.layout import Array


def check_input(name: str, value: object, shape: tuple[int, ...]) -> Array:
    """A float32 C-contiguous, aligned array of that shape; input that is not so is copied."""
    value = _as_array(name, value, shape)
    if value.shape != shape:
        raise ArrayError(f"{name} has shape {value.shape}; this kernel takes {shape}")
    if value.dtype != np.float32:
        fix = f"{name}.astype('float32')"
        raise ArrayError(f"{name} has dtype {value.dtype}; this kernel takes float32: {fix}")
    flags = value.flags
    return value if flags.c_contiguous and flags.aligned else np.array(value, order="C")


def check_output(value: object, shape: tuple[int, ...], inputs: Mapping[str, Array], out: str = "out") -> Array:
    """An array to write into, called ``out``: exact shape, dtype and order, apart from the inputs.

    It may be the residual itself: each element is read before it is written.
    """
    value = _as_array(out, value, shape)
    if value.shape != shape or value.dtype != np.float32:
        raise ArrayError(f"{out} has shape {value.shape} and dtype {value.dtype}; "
                         f"this kernel writes {shape} float32")
    if not value.flags.carray:
        raise ArrayError(f"{out} must be C-contiguous, aligned and writeable: np.empty(shape, 'float32')")
    for name, other in inputs.items():
        same = name == "residual" and other.ctypes.data == value.ctypes.data
        if not same and np.may_share_memory(other, value):
            raise ArrayError(f"{out} overlaps {name}; give it memory of its own")
    return value


def check_named(kind: str, shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, object]) -> dict[str, Array]:
    """The arrays of a kernel's inputs or weights, each by its name: all of them, and no others."""
    _check_names(kind, shapes, arrays, "")
    return {name: check_input(name, arrays[name], shape) for name, shape in shapes.items()}


def check_outputs(shapes: Mapping[str, tuple[int, ...]], out: object, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays to write into: one for the only output, else a dict by name; apart from each other and the inputs."""
    if not isinstance(out, Mapping):
        if len(shapes) > 1:
            raise ArrayError(f"out is a {type(out).__name__}; this kernel has the outputs {', '.join(shapes)}: give a "
                             "dict of arrays by their names")
        return {name: check_output(out, shape, inputs) for name, shape in shapes.items()}
    _check_names("output", shapes, out, "out: ")
    outputs: dict[str, Array] = {}
    for name, shape in shapes.items():
        outputs[name] = check_output(out[name], shape, {**inputs, **outputs}, name)
    return outputs


def _check_names(kind: str, known: Collection[str], given: Collection[str], where: str) -> None:
    """Raises ArrayError unless the names given are those that are known."""
    these = f"this kernel has the {kind}s {', '.join(known)}" if known else f"this kernel has no {kind}s"
    for name in given:
        if name not in known:
            raise ArrayError(f"{where}{name} is not the name of an {kind}; {these}".replace("an weight", "a weight"))
    if missing := [name for name in known if name not in given]:
        raise ArrayError(f"{where}{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; {these}")


def check_weights(problem: Problem, weight: object, bias: object) -> dict[str, Array]:
    """The weight arrays by tensor name."""
    arrays = {"w": check_input("weight", weight, problem.weight_shape)}
    if problem.bias:
        if bias is None:
            raise ArrayError(f"bias is missing; the layer has bias=True: give shape {problem.bias_shape}")
        arrays["b"] = check_input("bias", bias, problem.bias_shape)
    elif bias is not None:
        raise ArrayError("bias is given but the layer has bias=False; leave it out")
    return arrays


def _as_array(name: str, value: object, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The value, if it is an array; a masked one is refused, since a kernel would read what the mask hides, and a
    tensor of another library, since whether it is copied must be seen where that happens."""
    is_other = type(value) is not np.ndarray  # asked first: NumPy imports masked arrays at their first use
    if not isinstance(value, np.ndarray) or (is_other and isinstance(value, np.ma.MaskedArray)):
        calls = "".join(f".{call}()" for call in ("detach", "numpy") if hasattr(value, call))  # as of torch
        fix = f": {name}{calls}" if calls.endswith(".numpy()") else ""
        raise ArrayError(f"{name} is a {type(value).__name__}; give a NumPy array of shape {shape}, float32{fix}")
    return value
