"""How tiles of an algorithm lie in the planes of a layer: its groups, the phases of a dilation, a folded axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convsched.algebra.bilinear import Bilinear
from convsched.ir import Affine
from convsched.problem import Conv2d

Fold = Literal["", "h", "w"]


@dataclass(frozen=True)
class Plane:
    """How tiles of ``outputs`` (rows K, columns L) cover the output of a problem, one axis folded or none."""

    problem: Conv2d
    outputs: tuple[int, int]
    fold: Fold = ""

    @property
    def tiles(self) -> tuple[int, int]:
        """How many tiles there are along the rows and along the columns of a plane."""
        high, wide = self.outputs
        if not self.fold:
            (down, across), (E, F) = self.problem.dilation, (self.problem.E, self.problem.F)
            return -(-E // (down * high)), -(-F // (across * wide))
        along, lines = (self.problem.E, self.problem.F) if self.fold == "h" else (self.problem.F, self.problem.E)
        return -(-along // (high * wide)), lines

    @property
    def loops(self) -> dict[str, int]:
        """The loops over planes, those of more than one iteration."""
        extents = dict(zip(("group", "phase_e", "phase_f"), (self.problem.groups, *self.problem.dilation), strict=True))
        return {loop: extent for loop, extent in extents.items() if extent > 1}

    @property
    def number(self) -> Affine:
        """The number of a plane."""
        total = Affine.of(0)
        for loop, extent in self.loops.items():
            total = total * extent + loop
        return total

    def channel(self, name: Affine | str, count: int) -> Affine:
        """A channel of the plane's group, which has ``count``."""
        return Affine.of("group") * count + name if "group" in self.loops else Affine.of(name)

    def place(self, te: Affine | str | int, tf: Affine | str | int, i: str, j: Affine | str,
              steps: tuple[int, int] = (1, 1)) -> tuple[Affine, Affine]:
        """The row and the column of the image where element (i, j) of tile (te, tf) lies, borders not counted; tiles
        are ``steps`` times their outputs apart."""
        high, wide = self.outputs
        row, column = Affine.of(te) * (high * steps[0]) + i, Affine.of(tf) * (wide * steps[1]) + j
        if not self.fold:
            down, across = self.problem.dilation
            return (row * down + ("phase_e" if down > 1 else 0), column * across + ("phase_f" if across > 1 else 0))
        along, line = row * wide + j, Affine.of(tf)
        return (along, line) if self.fold == "h" else (line, along)


@dataclass(frozen=True)
class Shape:
    """What a schedule needs to know of an algorithm along columns and rows: a tile's ``outputs`` along both, its
    products (``points``), the elements of a row that it ``reads``, and how many sparse factors each transform has:
    those of columns and rows of the input, then of the output."""

    outputs: tuple[int, int]
    points: tuple[int, int]
    reads: int
    factors: tuple[int, int, int, int]
    fold: Fold = ""

    @staticmethod
    def of(column: Bilinear, row: Bilinear, fold: Fold = "") -> Shape:
        """The shape of two algorithms, as ``lower_bilinear`` takes them."""
        transforms = (column.input, row.input, column.output, row.output)
        counts: tuple[int, int, int, int] = tuple(len(of.factors) for of in transforms)  # type: ignore[assignment]
        return Shape((column.output.rows, row.output.rows), (column.rank, row.rank), row.input.columns, counts, fold)
