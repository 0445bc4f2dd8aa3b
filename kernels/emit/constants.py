"""Constant tensors in generated code: known elements are literals, zeros and ones vanish, the rest are tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convsched.ir import Program
from convsched.kernels.emit.addresses import base
from convsched.kernels.emit.forms import Point
from convsched.kernels.emit.nest import Coefficient, Unrolled
from convsched.kernels.emit.writer import float_literal


class Constants:
    """The constants of a program where the walk over its nest stands."""

    def __init__(self, program: Program, point: Point) -> None:
        self.program = program
        self.point = point
        self.tables: dict[str, str] = {}  # globals of those that are read at run time
        self._sparse: dict[str, NDArray[np.bool_]] = {}
        self._useful: dict[tuple[object, ...], list[int]] = {}

    def useful(self, unrolled: Unrolled) -> list[int]:
        """The iterations of an unrolled loop that do more than add products with zeros of a sparse matrix."""
        matrix, var, extent = unrolled.matrix, unrolled.loop.var, unrolled.loop.extent
        if matrix is None:
            return [*range(extent)]
        known = self.point.known
        known[var] = 0
        start = [None if place is None else place.at(known) for place in matrix.places]
        steps = [0 if place is None else place.affine.coefficient(var) for place in matrix.places]
        key = (matrix.tensor, *start, *steps, extent)
        if key not in self._useful:
            undecided = tuple([axis for axis, at in enumerate(start) if at is None])
            decided = np.asarray(self._nonzero(matrix.tensor).any(axis=undecided))
            values = np.arange(extent)
            places = tuple([at + step * values for at, step in zip(start, steps, strict=True) if at is not None])
            self._useful[key] = np.flatnonzero(decided[places]).tolist()
        return self._useful[key]

    def _nonzero(self, name: str) -> NDArray[np.bool_]:
        """Where a constant is not zero."""
        if name not in self._sparse:
            tensor = self.program.tensor(name)
            self._sparse[name] = np.reshape(np.array(tensor.values) != 0, tensor.shape)
        return self._sparse[name]

    def number(self, element: Coefficient) -> float | None:
        """The element of a constant tensor at this point; None where only run time knows it."""
        return None if element.place is None else element.values[element.place.at(self.point.known)]

    def use_table(self, name: str) -> None:
        """Keep a constant that is read at run time in a table of the module."""
        if name not in self.tables:
            tensor = self.program.tensor(name)
            values = ", ".join(f"float {float_literal(value)}" for value in tensor.values)
            self.tables[name] = (f"@{base(name)[1:]} = private unnamed_addr constant "
                                 f"[{tensor.elements} x float] [{values}], align 64")
