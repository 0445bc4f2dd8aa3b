"""Winograd's minimal filtering F(m, r): m outputs of r taps by m + r - 1 products.

    y = V_mᵀ [ (V_r w) ⊙ (V_n⁻ᵀ x) ]

V_k holds the powers 0 .. k-1 of the n = m + r - 1 points, a row each; one of the points is infinity, with the row
0 .. 0 1. It is Toom and Cook's product of two polynomials, interpolated from its values at n points, transposed.
Row i of V_n⁻ᵀ holds the coefficients of Lagrange's polynomial, prod over j != i of (X - a_j) / (a_i - a_j); that
of infinity those of prod (X - a_j).

The factor of a row in B or Cᵀ may move to A, which is exact to the last rounding. Powers of two change no rounding
error; other factors are chosen so that B and Cᵀ hold numbers float32 represents, and as many 1 as possible.

Source: Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2016; Barabasz, Anderson, Soodhalter and Gregg, "Error Analysis and Improving the
Accuracy of Winograd Convolution for Deep Neural Networks", 2018 (points).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache, partial, reduce
from math import pi, tan

import numpy as np

from convsched.algebra.bilinear import Bilinear, Matrix, Transform, correlate, direct, split_stride, split_taps, verify
from convsched.algebra.sums import shared_factors
from convsched.errors import LoweringError

Row = list[Fraction]

MOST_TAPS = 8  # of an algorithm for all taps at once: errors grow with them
PART_TAPS = 4  # taps of each part of more


def _both_signs(text: str) -> tuple[Fraction, ...]:
    return tuple(sign * Fraction(word) for word in text.split() for sign in ((1, -1) if word != "0" else (1,)))


POINTS = {n: _both_signs(text) for n, text in {
    3: "3/4",
    4: "0 1",
    5: "3/8 5/4",
    6: "0 2/3 3/2",
    7: "1/4 4/5 2",
    8: "0 1/2 1 2",
    9: "1/4 5/8 5/4 2",
    10: "0 1/2 4/5 5/4 2",
}.items()}
"""The finite points by n = m + r - 1: of the sets symmetric about 0 those of least error, within a few percent."""

EXACT_POINTS = _both_signs("0 3/4 3/2")
"""The points of F(4, 3): 7 % more error than the best, but float32 holds all constants of B and C."""


def default_points(m: int, r: int) -> tuple[Fraction, ...]:
    """The m + r - 2 finite points of ``winograd(m, r)``; infinity is one more.

    Good points are close to evenly spaced directions of the projective line, cot(π k / n). Beyond the table those
    are taken, as fractions.
    """
    n = m + r - 1
    if (m, r) == (4, 3):
        return EXACT_POINTS
    return POINTS.get(n) or tuple(Fraction(1 / tan(pi * k / n)).limit_denominator(n) for k in range(1, n))


@cache
def winograd(m: int, r: int, points: tuple[Fraction, ...] | None = None) -> Bilinear:
    """F(m, r) from m + r - 2 different finite points, and infinity; proved.

    With one output or one tap nothing can be saved: that is the definition itself. Raises LoweringError for sizes
    below 1 and for points that are too few, too many or equal.
    """
    name = f"winograd({m},{r})"
    if m < 1 or r < 1:
        raise LoweringError(f"{name}: {m} outputs of {r} taps; both must be 1 or more")
    if m == 1 or r == 1:
        return direct(m, r)
    chosen = default_points(m, r) if points is None else points
    if len(set(chosen)) != m + r - 2 or len(chosen) != m + r - 2:
        raise LoweringError(f"{name}: points {', '.join(map(str, chosen))}; give {m + r - 2} different ones "
                            "(infinity is one more), or none for the default")
    A, B, C = _vandermonde(chosen, r), _lagrange(chosen), _vandermonde(chosen, m)
    input_scales, output_scales = [_scale(row) for row in B], [_scale(row) for row in C]
    filters = _scaled(A, [1 / (b * c) for b, c in zip(input_scales, output_scales, strict=True)])
    triple = Bilinear(name, Transform((filters,)), shared_factors(_scaled(B, input_scales)),
                      shared_factors(_scaled(C, output_scales).transposed))
    return verify(triple, correlate)


@cache
def winograd_side(m: int, r: int, stride: int = 1) -> Bilinear:
    """m outputs of r taps at a stride along one side of a layer; proved. One tap has no algorithm but the definition.

    A stride is cut into phases and many taps into parts of nearly ``PART_TAPS``, each by F(m, its taps).
    """
    if r == 1:
        return direct(1, 1)
    if stride > 1:
        return verify(split_stride(m, r, stride, winograd), partial(correlate, stride=stride))
    if r > MOST_TAPS:
        return verify(split_taps(m, r, _part(r), winograd), correlate)
    return winograd(m, r)


def products(m: int, r: int, stride: int = 1) -> int:
    """The rank of ``winograd_side(m, r, stride)``, which need not be made for it.

    >>> [products(*side) == winograd_side(*side).rank for side in ((4, 3), (4, 1), (4, 3, 2), (2, 11))]
    [True, True, True, True]
    """
    if r == 1:
        return 1
    if stride > 1:
        parts = [len(range(phase, r, stride)) for phase in range(min(stride, r))]
    else:
        part = _part(r) if r > MOST_TAPS else r
        parts = [min(part, r - start) for start in range(0, r, part)]
    return sum(m + taps - 1 for taps in parts)


def _part(r: int) -> int:
    """The taps of each of as few parts of many as have nearly ``PART_TAPS``."""
    return -(-r // -(-r // PART_TAPS))


def _vandermonde(points: Sequence[Fraction], powers: int) -> list[Row]:
    """The powers of each point, and of infinity."""
    return [*([a**k for k in range(powers)] for a in points), [Fraction(k == powers - 1) for k in range(powers)]]


def _lagrange(points: Sequence[Fraction]) -> list[Row]:
    """V⁻ᵀ: the polynomial that is 1 at a point and 0 at the others, for each; for infinity the monic one."""
    rows = []
    for i, a in enumerate(points):
        others = [b for j, b in enumerate(points) if j != i]
        value = reduce(lambda done, b: done * (a - b), others, Fraction(1))
        rows.append([c / value for c in _monic(others)] + [Fraction(0)])
    return [*rows, _monic(points)]


def _monic(roots: Iterable[Fraction]) -> Row:
    """The coefficients of prod (X - root), the lowest power first."""
    def times(row: Row, root: Fraction) -> Row:
        return [up - root * same for up, same in zip([Fraction(0), *row], [*row, Fraction(0)], strict=True)]
    return reduce(times, roots, [Fraction(1)])


def _scale(row: Row) -> Fraction:
    """The factor after which float32 holds most coefficients as they are, the most of them 1 or -1."""
    def cost(scale: Fraction) -> tuple[int, int, Fraction]:
        scaled = [abs(c * scale) for c in row if c]
        return (sum(Fraction(float(np.float32(float(c)))) != c for c in scaled), sum(c != 1 for c in scaled),
                max(scaled))
    return min((1 / abs(c) for c in row if c), key=cost)


def _scaled(rows: list[Row], scales: Iterable[Fraction]) -> Matrix:
    return Matrix.of([[c * scale for c in row] for row, scale in zip(rows, scales, strict=True)])
