"""Binding weights: copies of weights in the order of use, flushed and aligned, made by NumPy views.

A packing stage stores ``packed[v0, v1, ...] = w[A v + a]`` with an affine index: as a view of ``w`` with
strides ``A^T strides(w)``. Elements outside ``w`` are zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convsched.errors import LoweringError
from convsched.ir import Load, Loop, Program, Store

Array = npt.NDArray[np.float32]
ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Copy:
    """One packing stage: ``coefficients[axis][i]`` of loop ``i`` in the source's index along ``axis``.

    The target has one axis a loop; ``shape`` exceeds ``extents`` where loops stop short of a zero tail.
    """

    target: str
    source: str
    shape: tuple[int, ...]
    extents: tuple[int, ...]
    coefficients: tuple[tuple[int, ...], ...]
    constants: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``Copy.from_json`` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Copy:
        """The copy of a JSON value."""
        return Copy(value["target"], value["source"], tuple(value["shape"]), tuple(value["extents"]),
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
        packed = aligned_zeros(math.prod(self.shape))
        packed.reshape(self.shape)[tuple(map(slice, self.extents))] = view
        flush_denormals(packed)
        return packed


def copies(program: Program) -> tuple[Copy, ...]:
    """The packing stages of a program."""
    return tuple(_copy(program, stage.name, stage.body) for stage in program.stages if stage.when == "bind")


def _copy(program: Program, name: str, body: Sequence[object]) -> Copy:
    loops: list[Loop] = []
    statement = body[0]
    while isinstance(statement, Loop):
        loops.append(statement)
        statement = statement.body[0]
    if not isinstance(statement, Store) or not isinstance(statement.value, Load):
        raise LoweringError(f"stage {name!r} runs when weights are bound but is no plain copy")
    index = statement.value.index
    return Copy(
        target=statement.tensor, source=statement.value.tensor, shape=program.tensor(statement.tensor).shape,
        extents=tuple(loop.extent for loop in loops),
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
