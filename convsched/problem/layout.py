"""The layouts of activations: names, storage orders, and arrays in them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from convsched.problem.conv2d import Conv2d
from convsched.problem.problem import Problem

Layout: TypeAlias = Literal["nchw", "nhwc", "nchw16c"]
LAYOUTS: dict[str, tuple[str, ...]] = {
    "nchw": ("n", "c", "h", "w"),
    "nhwc": ("n", "h", "w", "c"),
    "nchw16c": ("n", "c/16", "h", "w", "c%16"),
}
"""The layouts of activations, and the storage order of each."""

Array = npt.NDArray[np.float32]


def activation_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape of an (N, C, H, W) array in a layout; (N, C) of fully connected layers stays."""
    if len(shape) != 4 or layout == "nchw":
        return shape
    n, c, h, w = shape
    return (n, h, w, c) if layout == "nhwc" else (n, -(-c // 16), h, w, 16)


def to_layout(array: Array, layout: str) -> Array:
    """An (N, C, H, W) array in a layout, channel tails of ``nchw16c`` zero."""
    if array.ndim != 4 or layout == "nchw":
        return np.ascontiguousarray(array)
    if layout == "nhwc":
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    n, c, h, w = array.shape
    padded = np.pad(array, ((0, 0), (0, -c % 16), (0, 0), (0, 0)))
    return np.ascontiguousarray(padded.reshape(n, -1, 16, h, w).transpose(0, 1, 3, 4, 2))


def from_layout(array: Array, shape: tuple[int, ...], layout: str) -> Array:
    """The inverse of ``to_layout`` for an (N, C, H, W) ``shape``."""
    if len(shape) != 4 or layout == "nchw":
        return array
    if layout == "nhwc":
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    n, c, h, w = shape
    return np.ascontiguousarray(array.transpose(0, 1, 4, 2, 3).reshape(n, -1, h, w)[:, :c])


def has_tail(problem: Problem, layout: str) -> bool:
    """Whether a blocked output has channels that no map owns."""
    return layout == "nchw16c" and isinstance(problem, Conv2d) and problem.M % 16 > 0


def clear_tail(problem: Problem, out: Array) -> None:
    """Zero the channels of a blocked output that no map owns."""
    out[:, -1, :, :, problem.M % 16:] = 0.0
