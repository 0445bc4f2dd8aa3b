"""Binding weights: copies of weights in the order of use, flushed and aligned, made by NumPy views.

A packing stage stores ``packed[v0, v1, ...] = w[A v + a]`` with an affine index: as a view of ``w`` with
strides ``A^T strides(w)``. Elements outside ``w`` are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convsched.address import offset
from convsched.ir import Load, Program, Stage, leaves

Array = npt.NDArray[np.float32]
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Copy:
    """One packing stage: ``coefficients[axis][i]`` of loop ``i`` in the source's index along ``axis``.

    ``strides`` are the loops' in the target, in elements; what no loop writes of its ``elements`` is zero.
    """

    target: str
    source: str
    elements: int
    strides: tuple[int, ...]
    extents: tuple[int, ...]
    coefficients: tuple[tuple[int, ...], ...]
    constants: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``Copy.from_json`` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Copy:
        """The copy of a JSON value."""
        return Copy(value["target"], value["source"], value["elements"], tuple(value["strides"]),
                    tuple(value["extents"]),
                    tuple(map(tuple, value["coefficients"])), tuple(value["constants"]))

    def run(self, source: Array) -> Array:
        """The packed array, flat."""
        most = [c + sum(max(0, k) * (e - 1) for k, e in zip(row, self.extents, strict=True))
                for c, row in zip(self.constants, self.coefficients, strict=True)]
        missing = [max(0, m + 1 - size) for m, size in zip(most, source.shape, strict=True)]
        if any(missing):
            source = np.pad(source, [(0, n) for n in missing])
        start = source[tuple(slice(c, None) for c in self.constants)]
        strides = [sum(row[i] * s for row, s in zip(self.coefficients, source.strides, strict=True))
                   for i in range(len(self.extents))]
        view = np.lib.stride_tricks.as_strided(start, self.extents, strides, writeable=False)
        packed = aligned_zeros(self.elements)
        np.lib.stride_tricks.as_strided(packed, self.extents, [4 * s for s in self.strides])[...] = view
        flush_denormals(packed)
        return packed


def plain(name: str, array: Array) -> Copy:
    """The copy that only aligns an array and flushes its denormals."""
    strides = tuple(s // array.itemsize for s in np.empty(array.shape, np.float32).strides)
    identity = tuple(tuple(int(i == j) for j in range(array.ndim)) for i in range(array.ndim))
    return Copy(name, name, array.size, strides, array.shape, identity, (0,) * array.ndim)


def copy_of(program: Program, stage: Stage) -> Copy:
    """A packing stage as data; the steps of a schedule leave it a copy, cut into equal parts."""
    (loops, statement), = leaves(stage.body)
    assert isinstance(statement.value, Load)
    extents = {loop.var: loop.extent for loop in loops}
    target = program.tensor(statement.tensor)
    place = offset(target, statement.index, extents)
    assert not place.rest
    assert not place.affine.constant
    index = statement.value.index
    return Copy(
        target=target.name, source=statement.value.tensor, elements=target.elements,
        strides=tuple(place.affine.coefficient(loop.var) for loop in loops), extents=tuple(extents.values()),
        coefficients=tuple(tuple(a.coefficient(loop.var) for loop in loops) for a in index),
        constants=tuple(a.constant for a in index))


def aligned_zeros(elements: int) -> Array:
    """A flat array of zeros whose data starts on a cache line."""
    raw = np.zeros(elements + ALIGNMENT // 4, np.float32)
    start = -raw.ctypes.data % ALIGNMENT // 4
    return raw[start:start + elements]


def flush_denormals(values: Array) -> None:
    """Set numbers below the smallest normal to zero, in place: they slow arithmetic 10 to 100 times."""
    tiny = np.finfo(np.float32).tiny
    small = np.abs(values) < tiny
    if small.any():
        values[small] = 0.0
