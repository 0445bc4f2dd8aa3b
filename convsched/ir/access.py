"""The class of an access: how the lanes of a vector statement meet the elements of a tensor.

Lanes lie a constant number of elements apart, their stride, or anywhere. So an access is

    scalar       outside vector loops
    broadcast    stride 0: one element for all lanes
    contiguous   stride 1: neighbours, moved as a vector
    strided      stride 2 to 4 (loads only): vectors that cover the run, every stride-th lane of them picked
    transposed   lanes are rows further apart, whose neighbours other iterations of one unrolled loop move: rows are
                 moved whole, and a square of them is transposed in registers
    gathered     anything else: lane by lane

The class follows from the nest alone. What it costs (``model.issue``) and how it is written (``kernels.emit``) both
read it here. A border can take an access out of its class at single points: an emitter then goes lane by lane.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from convsched.ir.address import Offset

AccessKind = Literal["scalar", "broadcast", "contiguous", "strided", "transposed", "gathered"]

WIDEST_STRIDE = 4  # elements apart that lanes are picked out of whole vectors: a wider one wastes most of what it loads
SQUARES = (4, 8, 16)  # lanes of the registers whose transposition is known


@dataclass(frozen=True, slots=True)
class Access:
    """An access where it stands: its address, its class, the elements from lane to lane (0 where that is not one
    number), and of transposed ones the unrolled loop over neighbours, "" where no one loop is."""

    offset: Offset
    kind: AccessKind
    stride: int = 0
    run: str = ""


@dataclass(frozen=True, slots=True)
class Vector:
    """The vector loop around a statement: variable and extent (1: there is none), and the lanes of a register."""

    var: str
    count: int
    width: int

    @property
    def is_square(self) -> bool:
        """Whether its lanes are a whole register, so that as many rows are a square."""
        return self.count == self.width and self.count in SQUARES


def classify_load(offset: Offset, vector: Vector, unrolled: Mapping[str, int]) -> Access:
    """The class of a load at an address; ``unrolled`` are the extents of the unrolled loops around it.

    >>> from convsched.ir.affine import Affine
    >>> lanes, f = Vector("m", 16, 16), Affine.of("f")
    >>> for at in (f, f + "m", f * 2 + Affine.of("m") * 2, f + Affine.of("m") * 49, Affine.of("m") * 49):
    ...     print(classify_load(Offset(at), lanes, {"f": 14}).kind)
    broadcast
    contiguous
    strided
    transposed
    gathered
    """
    if vector.count == 1:
        return Access(offset, "scalar")
    if _is_scattered(offset, vector):
        return Access(offset, "gathered")
    stride = offset.affine.coefficient(vector.var)
    if 0 <= stride <= WIDEST_STRIDE:
        return Access(offset, "broadcast" if stride == 0 else "contiguous" if stride == 1 else "strided", stride)
    run = _run(offset, unrolled)
    if vector.is_square and run:
        return Access(offset, "transposed", stride, run)
    return Access(offset, "gathered", stride)


def classify_store(offset: Offset, vector: Vector, unrolled: Mapping[str, int]) -> Access:
    """The class of a store at an address: rows wait for their neighbours, whichever statement stores those.

    >>> from convsched.ir.affine import Affine
    >>> [classify_store(Offset(Affine((("m", stride),))), Vector("m", 16, 16), {}).kind for stride in (1, 2, 49, 0)]
    ['contiguous', 'transposed', 'transposed', 'gathered']
    """
    if vector.count == 1:
        return Access(offset, "scalar")
    if _is_scattered(offset, vector):
        return Access(offset, "gathered")
    stride = offset.affine.coefficient(vector.var)
    if stride == 1:
        return Access(offset, "contiguous", 1)
    if stride > 1 and vector.is_square:
        return Access(offset, "transposed", stride, _run(offset, unrolled))
    return Access(offset, "gathered", stride)


def _is_scattered(offset: Offset, vector: Vector) -> bool:
    """Whether lanes are not a constant distance apart."""
    return any(vector.var in digit.value.variables for digit in offset.rest)


def _run(offset: Offset, unrolled: Mapping[str, int]) -> str:
    """The one unrolled loop whose iterations are neighbours in memory; "" where there is none, or several."""
    runs = [var for var, c in offset.affine.terms if c == 1 and unrolled.get(var, 1) > 1]
    return runs[0] if len(runs) == 1 else ""
