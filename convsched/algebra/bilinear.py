"""Bilinear algorithms: three constant matrices, exact and proved, and larger ones built from smaller.

    y = Cᵀ[(A w) ⊙ (B x)]

``w`` is a filter, ``x`` a tile of the input, ``y`` the tile of outputs they give, each as a vector; ⊙ multiplies
element by element. ``filter`` is A (rank × w), ``input`` is B (rank × x) and ``output`` is Cᵀ (y × rank). Where
the elements are vectors over channels, each of the ``rank`` products is a sum over channels.

Each is a `Transform`: matrices applied one after the other, so that long ones cost n log n. Coefficients are
exact numbers; floats appear only in ``array``.

Source: Winograd, "Arithmetic Complexity of Computations", 1980; Blahut, "Fast Algorithms for Signal Processing",
2010, chapters 5 and 11 (nesting).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from itertools import accumulate
from math import lcm, prod
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from convsched.errors import LoweringError
from convsched.lazy import cached_property


class Number(Protocol):
    """An exact number: a Fraction, or another type that adds to, multiplies with and compares to Fractions.

    ``abs`` is at least the absolute value, and that of a product at most the product of the two; times its
    ``denominator`` a number is an integer of its ring.
    """

    @property
    def denominator(self) -> int: ...
    def __add__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: Any, /) -> Any: ...
    def __abs__(self) -> Fraction: ...
    def __float__(self) -> float: ...


Row: TypeAlias = tuple[tuple[int, Number], ...]
Definition: TypeAlias = Callable[[Sequence[int], Sequence[int]], Sequence[int]]
"""What a triple should compute, ``(w, x) -> y``: bilinear, with coefficients -1, 0 or 1 for each w_i x_j."""

ONE = Fraction(1)


@dataclass(frozen=True)
class Matrix:
    """A constant matrix; ``rows`` hold the (column, coefficient) pairs that are not zero, by column."""

    rows: tuple[Row, ...]
    columns: int

    @staticmethod
    def of(dense: Iterable[Iterable[Number | int]]) -> Matrix:
        """From all coefficients, row by row; integers become Fractions.

        >>> Matrix.of([[1, 0], [0, -2]]).rows[1]
        ((1, Fraction(-2, 1)),)
        """
        full = [[Fraction(a) if isinstance(a, int) else a for a in row] for row in dense]
        return Matrix(tuple(tuple((j, a) for j, a in enumerate(row) if a) for row in full), len(full[0]))

    @staticmethod
    def identity(size: int) -> Matrix:
        """The matrix that changes nothing."""
        return Matrix.select(range(size), size)

    @staticmethod
    def select(chosen: Iterable[int], columns: int) -> Matrix:
        """The matrix that takes the chosen elements of a vector of ``columns``."""
        return Matrix(tuple(((j, ONE),) for j in chosen), columns)

    @cached_property
    def dense(self) -> tuple[tuple[Number, ...], ...]:
        """All coefficients, row by row."""
        known = map(dict, self.rows)
        return tuple(tuple(row.get(j, Fraction(0)) for j in range(self.columns)) for row in known)

    @property
    def transposed(self) -> Matrix:
        """Rows and columns exchanged."""
        turned: list[list[tuple[int, Number]]] = [[] for _ in range(self.columns)]
        for i, row in enumerate(self.rows):
            for j, a in row:
                turned[j].append((i, a))
        return Matrix(tuple(map(tuple, turned)), len(self.rows))

    def __matmul__(self, other: Matrix) -> Matrix:
        rows = []
        for row in self.rows:
            sums: dict[int, Number] = {}
            for k, a in row:
                for j, b in other.rows[k]:
                    sums[j] = sums[j] + a * b if j in sums else a * b
            rows.append(tuple((j, sums[j]) for j in sorted(sums) if sums[j]))
        return Matrix(tuple(rows), other.columns)

    def kron(self, other: Matrix) -> Matrix:
        """The Kronecker product: element (i, j) of this times ``other``, as block (i, j)."""
        return Matrix(tuple(tuple((j * other.columns + l, a * b) for j, a in row for l, b in second)
                            for row in self.rows for second in other.rows), self.columns * other.columns)

    def scaled(self, factors: Iterable[Number]) -> Matrix:
        """Each row times its factor."""
        return Matrix(tuple(tuple((j, a * f) for j, a in row) for row, f in zip(self.rows, factors, strict=True)),
                      self.columns)

    def apply(self, values: Sequence[Any]) -> list[Any]:
        """The matrix times a vector of exact numbers, or of arrays of them."""
        return [sum((a * values[j] for j, a in row), start=0) for row in self.rows]

    def array(self) -> NDArray[np.float64]:
        """All coefficients in float64, each rounded once."""
        filled = np.zeros((len(self.rows), self.columns))
        for i, row in enumerate(self.rows):
            for j, a in row:
                filled[i, j] = float(a)
        return filled


def side_by_side(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of equally many rows next to each other."""
    starts = [0, *accumulate(m.columns for m in matrices)]
    rows = zip(*(m.rows for m in matrices), strict=True)
    return Matrix(tuple(tuple((start + j, a) for start, part in zip(starts, row, strict=False) for j, a in part)
                        for row in rows), starts[-1])


def diagonal(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices as the blocks of a diagonal: each acts on its own part of the vector."""
    starts = [0, *accumulate(m.columns for m in matrices)]
    return Matrix(tuple(tuple((start + j, a) for j, a in row)
                        for start, m in zip(starts, matrices, strict=False) for row in m.rows), starts[-1])


@dataclass(frozen=True)
class Transform:
    """A linear map as its sparse factors, the first to be applied first."""

    factors: tuple[Matrix, ...]

    @property
    def rows(self) -> int:
        """Elements it gives."""
        return len(self.factors[-1].rows)

    @property
    def columns(self) -> int:
        """Elements it takes."""
        return self.factors[0].columns

    @cached_property
    def matrix(self) -> Matrix:
        """The product of the factors."""
        return reduce(lambda done, factor: factor @ done, self.factors)

    @property
    def transposed(self) -> Transform:
        """The transposed map: the factors transposed, in the other order."""
        return Transform(tuple(factor.transposed for factor in reversed(self.factors)))

    def then(self, *factors: Matrix) -> Transform:
        """This map and further factors after it."""
        return Transform((*self.factors, *factors))

    def kron(self, other: Transform) -> Transform:
        """The Kronecker product, as ``other`` along the second index, then this along the first."""
        second = (Matrix.identity(self.columns).kron(factor) for factor in other.factors)
        first = (factor.kron(Matrix.identity(other.rows)) for factor in self.factors)
        return Transform((*second, *first))

    def apply(self, values: Sequence[Any]) -> list[Any]:
        """The map of a vector of exact numbers, or of arrays of them."""
        return reduce(lambda done, factor: factor.apply(done), self.factors, list(values))


@dataclass(frozen=True)
class Bilinear:
    """A bilinear algorithm; ``rank`` is its number of products. Raises LoweringError if the sizes disagree."""

    name: str
    filter: Transform
    input: Transform
    output: Transform

    def __post_init__(self) -> None:
        if not self.filter.rows == self.input.rows == self.output.columns:
            raise LoweringError(f"{self.name}: the filter transform has {self.filter.rows} rows, that of the input "
                                f"{self.input.rows}, and the output transform {self.output.columns} columns; all "
                                "three must be the number of products")

    @property
    def rank(self) -> int:
        """The number of products."""
        return self.filter.rows

    def compute(self, w: Sequence[Any], x: Sequence[Any]) -> list[Any]:
        """y of exact numbers."""
        products = [a * b for a, b in zip(self.filter.apply(w), self.input.apply(x), strict=True)]
        return self.output.apply(products)


def plain(name: str, A: Matrix, B: Matrix, C: Matrix) -> Bilinear:
    """The triple y = Cᵀ[(A w) ⊙ (B x)], each transform one matrix; all three have a row for each product."""
    return Bilinear(name, Transform((A,)), Transform((B,)), Transform((C.transposed,)))


def correlate(w: Sequence[int], x: Sequence[int], stride: int = 1, dilation: int = 1) -> list[int]:
    """What a convolution layer computes along one axis: y_i = sum_k w_k x_{stride i + dilation k}.

    >>> correlate([1, 10, 100], [1, 2, 3, 4])
    [321, 432]
    """
    outputs = (len(x) - dilation * (len(w) - 1) - 1) // stride + 1
    return [sum(w[k] * x[stride * i + dilation * k] for k in range(len(w))) for i in range(outputs)]


def direct(m: int, r: int) -> Bilinear:
    """The definition as a triple: m outputs, r taps, one product for each (output, tap) pair."""
    pairs = [(i, k) for i in range(m) for k in range(r)]
    return plain(f"direct({m},{r})", Matrix.select((k for _, k in pairs), r),
                 Matrix.select((i + k for i, k in pairs), m + r - 1), Matrix.select((i for i, _ in pairs), m))


def verify(triple: Bilinear, definition: Definition) -> Bilinear:
    """The triple itself, proved to compute ``definition``; raises LoweringError where it does not.

    With w_i = X^i and x_j = X^(j len(w)), both sides are polynomials in X, in which X^(i + j len(w)) has the
    coefficient of w_i x_j. Times the common denominator D of the triple, the coefficients of the difference are
    integers, below D (product of the norms of all factors + 1). For an X of at least twice that bound the
    difference is zero only if every coefficient is: one evaluation in exact numbers is a proof (Kronecker's
    substitution: von zur Gathen, Gerhard, "Modern Computer Algebra", 2013, section 8.4).
    """
    factors = [factor for part in (triple.filter, triple.input, triple.output) for factor in part.factors]
    common = prod(lcm(*(a.denominator for row in factor.rows for _, a in row)) for factor in factors)
    norms = prod(max(sum(abs(a) for _, a in row) for row in factor.rows) for factor in factors)
    bits = int(2 * common * (norms + 1)).bit_length()
    size = triple.filter.columns
    w = [1 << (bits * i) for i in range(size)]
    x = [1 << (bits * size * j) for j in range(triple.input.columns)]
    found, expected = triple.compute(w, x), definition(w, x)
    if len(found) != len(expected):
        raise LoweringError(f"{triple.name}: it has {len(found)} outputs where the definition has {len(expected)}; "
                            "give the triple and the definition of one problem")
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    if wrong:
        raise LoweringError(f"{triple.name}: outputs {wrong} of {triple.output.rows} are not what the definition "
                            "gives; check the coefficients of the three matrices")
    return triple


def kronecker(first: Bilinear, second: Bilinear) -> Bilinear:
    """Both at once, on vectors indexed by (index of first, index of second): 2-D from 1-D, space and blocks.

    The product of two correct triples is correct: (A ⊗ A')(w ⊗ w') = A w ⊗ A' w', and so for B and C.
    """
    return Bilinear(f"{first.name} x {second.name}", first.filter.kron(second.filter),
                    first.input.kron(second.input), first.output.kron(second.output))


@dataclass(frozen=True)
class Piece:
    """A triple on parts of larger vectors: y[outputs] += triple(w[taps], x[inputs])."""

    triple: Bilinear
    taps: range
    inputs: range
    outputs: range


def piecewise(name: str, pieces: Sequence[Piece]) -> Bilinear:
    """The triple that computes all pieces and adds them up; together they cover each vector to its end."""
    def size(parts: Iterable[range]) -> int:
        return 1 + max(part[-1] for part in parts)

    filters, inputs = (
        _together([Transform((transform.factors[0] @ Matrix.select(part, size(parts)), *transform.factors[1:]))
                   for part, transform in zip(parts, transforms, strict=True)])
        for parts, transforms in (([p.taps for p in pieces], [p.triple.filter for p in pieces]),
                                  ([p.inputs for p in pieces], [p.triple.input for p in pieces])))
    places = [Matrix.select(p.outputs, size(q.outputs for q in pieces)).transposed for p in pieces]
    *first, last = _abreast([p.triple.output for p in pieces]).factors
    return Bilinear(name, filters, inputs, Transform((*first, side_by_side(places) @ last)))


def _abreast(transforms: Sequence[Transform]) -> Transform:
    """Transforms each on its own part of the vector; the short ones wait for the long ones."""
    length = max(len(t.factors) for t in transforms)
    padded = [t.then(*[Matrix.identity(t.rows)] * (length - len(t.factors))) for t in transforms]
    return Transform(tuple(diagonal(level) for level in zip(*(t.factors for t in padded), strict=True)))


def _together(transforms: Sequence[Transform]) -> Transform:
    """Transforms of the same vector, the results one after the other."""
    columns = transforms[0].columns
    fan = Matrix.select([*range(columns)] * len(transforms), columns)
    first, *rest = _abreast(transforms).factors
    return Transform((first @ fan, *rest))


Build: TypeAlias = Callable[[int, int], Bilinear]
"""(outputs, taps) -> the triple of that stride-1 correlation."""


def split_stride(m: int, r: int, stride: int, build: Build) -> Bilinear:
    """m outputs of r taps at a stride, as one stride-1 piece for each phase of the taps.

    y_i = sum_p sum_q w_{s q + p} x_{s (i + q) + p}: phase p of the filter meets phase p of the input.
    """
    phases = [range(p, r, stride) for p in range(min(stride, r))]
    pieces = [Piece(build(m, len(taps)), taps, range(taps[0], taps[-1] + stride * (m - 1) + 1, stride), range(m))
              for taps in phases]
    return piecewise(f"stride {stride}: {' + '.join(p.triple.name for p in pieces)}", pieces)


def split_dilation(m: int, r: int, dilation: int, build: Build) -> Bilinear:
    """m outputs of r taps at a dilation, as one stride-1 piece for each phase of the outputs.

    y_{d i + p} = sum_k w_k x_{d (i + k) + p}: the whole filter meets each phase of the input.
    """
    phases = [range(p, m, dilation) for p in range(min(dilation, m))]
    pieces = [Piece(build(len(outputs), r), range(r),
                    range(outputs[0], outputs[-1] + dilation * (r - 1) + 1, dilation), outputs)
              for outputs in phases]
    return piecewise(f"dilation {dilation}: {' + '.join(p.triple.name for p in pieces)}", pieces)


def split_taps(m: int, r: int, most: int, build: Build) -> Bilinear:
    """m outputs of r taps, as pieces of at most ``most`` taps that add up to the same outputs."""
    starts = range(0, r, most)
    pieces = [Piece(build(m, len(taps)), taps, range(taps[0], taps[-1] + m), range(m))
              for taps in (range(start, min(start + most, r)) for start in starts)]
    return piecewise(f"taps {most}: {' + '.join(p.triple.name for p in pieces)}", pieces)
