"""Constant tensors in generated code: known elements are literals, zeros and ones vanish, the rest are tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convsched.ir import Load, Loop, Op, Program, Tensor, Value, leaves, matrix_of
from convsched.kernels.emit.addresses import Point, base
from convsched.kernels.emit.writer import float_literal


class Constants:
    """The constants of a program where the walk over its nest stands."""

    def __init__(self, program: Program, point: Point) -> None:
        self.program = program
        self.point = point
        self.tables: dict[str, str] = {}  # globals of those that are read at run time
        self._sparse: dict[str, NDArray[np.bool_]] = {}

    def useful(self, loop: Loop) -> list[int]:
        """The iterations of an unrolled loop that do more than add products with zeros of a sparse matrix."""
        (_, leaf), *others = leaves(loop.body)
        matrix = None if others else matrix_of(self.program, leaf)
        if matrix is None or loop.var not in {v for a in matrix.index for v in a.variables}:
            return [*range(loop.extent)]
        if any(len(a.variables) > 1 for a in matrix.index):
            return [*range(loop.extent)]
        found = []
        for value in range(loop.extent):
            self.point.known[loop.var] = value
            place = tuple(a.evaluate(self.point.known) if a.variables <= self.point.known.keys() else slice(None)
                          for a in matrix.index)
            if self._nonzero(matrix.tensor)[place].any():
                found.append(value)
        del self.point.known[loop.var]
        return found

    def _nonzero(self, name: str) -> NDArray[np.bool_]:
        """Where a constant is not zero."""
        if name not in self._sparse:
            tensor = self.program.tensor(name)
            self._sparse[name] = np.reshape(np.array(tensor.values) != 0, tensor.shape)
        return self._sparse[name]

    def number(self, load: Load) -> float | None:
        """The element of a constant tensor at this point; None where only run time knows it."""
        tensor, place = self.program.tensor(load.tensor), 0
        if not {v for a in load.index for v in a.variables} <= self.point.known.keys():
            return None
        for a, size in zip(load.index, tensor.shape, strict=True):
            place = place * size + a.evaluate(self.point.known)
        return tensor.values[place]

    def factor(self, product: Op) -> tuple[float | None, Value | None]:
        """The constant factor of a product, if it has one that is known, and the other."""
        for one, other in (product.values, product.values[::-1]):
            if isinstance(one, Load) and self.program.tensor(one.tensor).role == "constant":
                return self.number(one), other
        return None, None

    def table(self, name: str) -> Tensor:
        """A constant that is read at run time, from a table of the module."""
        tensor = self.program.tensor(name)
        values = ", ".join(f"float {float_literal(value)}" for value in tensor.values)
        self.tables.setdefault(name, f"@{base(name)[1:]} = private unnamed_addr constant "
                               f"[{tensor.elements} x float] [{values}], align 64")
        return tensor
