"""FFT tiles of a layer: along both axes, or along the only one with several taps, which may fold into a plane."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from convsched.algebra.bilinear import Bilinear, Matrix, Transform, direct
from convsched.algebra.fft import part_of_tile
from convsched.errors import LoweringError
from convsched.ir import Program
from convsched.lower.plane import Fold, Plane, Shape
from convsched.lower.tiles import dense_array, lower_bilinear
from convsched.problem import Conv2d


@dataclass(frozen=True)
class Side:
    """Tiles of ``n`` points along a side of a plane: ``taps`` and ``outputs`` of each; one point is not a transform."""

    n: int
    taps: int
    outputs: int

    @property
    def points(self) -> int:
        """Products of a tile."""
        return 3 * self.n // 2 if self.n > 1 else 1

    @property
    def reads(self) -> int:
        """Inputs of a tile."""
        return self.outputs + self.taps - 1

    @property
    def triple(self) -> Bilinear:
        """The algorithm along this side."""
        return part_of_tile(self.n, self.taps, self.outputs) if self.n > 1 else direct(1, 1)

    @property
    def dense(self) -> Bilinear:
        """The algorithm as it runs: each transform one matrix, of numbers rounded to multiples of 2^-60."""
        triple = self.triple
        A, B, C = (Matrix.of([Fraction(round(a * 2**60), 2**60) for a in row] for row in dense_array(transform))
                   for transform in (triple.filter, triple.input, triple.output))
        return Bilinear(triple.name, Transform((A,)), Transform((B,)), Transform((C,)))


@dataclass(frozen=True)
class Fft:
    """FFT tiles of a problem, along the columns and along the rows of its plane."""

    problem: Conv2d
    column: Side
    row: Side
    fold: Fold

    @property
    def plane(self) -> Plane:
        """Where the tiles lie."""
        return Plane(self.problem, (self.column.outputs, self.row.outputs), self.fold)

    @property
    def name(self) -> str:
        """The member's name: fft(64), fft(64)x(32)."""
        sizes = [side.n for side in (self.column, self.row) if side.n > 1]
        if len(sizes) == 2 and sizes[0] == sizes[1] and not self.fold:
            sizes = sizes[:1]
        return "fft" + "x".join(f"({n})" for n in sizes)

    @property
    def shape(self) -> Shape:
        """What a schedule needs to know."""
        return Shape.of(self.column.triple, self.row.triple, self.fold)

    def lower(self, layout: str) -> Program:
        """The unscheduled program."""
        return lower_bilinear(self.problem, self.column.triple, self.row.triple, layout, self.fold)


def _side(n: int, taps: int, extent: int) -> Side:
    """Tiles of n points that cover the outputs of a side in equal parts."""
    if n < max(taps, 2) or n & (n - 1):
        raise LoweringError(f"fft({n}): a tile for {taps} taps has a power of two of points, from {max(taps, 2)} on")
    tiles = -(-extent // (n - taps + 1))
    return Side(n, taps, -(-extent // tiles))


def fft_tiles(p: Conv2d, sizes: tuple[int, ...]) -> Fft:
    """The tiles of given sizes: the points along both sides (one for both), or along the side with taps, and of a row
    of its folded plane. Raises LoweringError for sizes that do not fit."""
    if p.R > 1 and p.S > 1:
        column, row = (_side(n, taps, extent) for n, taps, extent
                       in zip((sizes * 2)[:2], (p.R, p.S), (p.E, p.F), strict=True))
        return Fft(p, column, row, "")
    fold: Fold = "h" if p.R > 1 else "w"
    taps, extent = (p.R, p.E) if p.R > 1 else (p.S, p.F)
    if len(sizes) == 1:
        along, across = _side(sizes[0], taps, extent), Side(1, 1, 1)
        return Fft(p, along, across, "") if fold == "h" else Fft(p, across, along, "")
    width = max(1, sizes[1] // 2)
    return Fft(p, _side(sizes[0], -(-taps // width), -(-extent // width)), _side(sizes[1], width, width), fold)
