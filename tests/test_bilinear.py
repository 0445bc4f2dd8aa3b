"""Triples: exact arithmetic, the proof, and larger ones from smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from convsched.algebra.bilinear import (
    Bilinear,
    Matrix,
    Transform,
    correlate,
    diagonal,
    direct,
    kronecker,
    plain,
    side_by_side,
    split_dilation,
    split_stride,
    split_taps,
    verify,
)
from convsched.algebra.fft import fft_tile
from convsched.algebra.strassen import matrix_product, strassen
from convsched.algebra.winograd import winograd
from convsched.errors import LoweringError

LEFT = Matrix.of([[1, 0, -2], [0, Fraction(3, 4), 0]])
RIGHT = Matrix.of([[0, 5], [1, 0], [2, 2]])


def correlate_2d(w: Sequence[int], x: Sequence[int], *, r: int, s: int, width: int) -> list[int]:
    """The definition in two dimensions, on vectors row by row."""
    height = len(x) // width
    return [sum(w[s * a + b] * x[width * (e + a) + f + b] for a in range(r) for b in range(s))
            for e in range(height - r + 1) for f in range(width - s + 1)]


def with_part(triple: Bilinear, part: str, transform: Transform) -> Bilinear:
    """The triple with another ``filter``, ``input`` or ``output``."""
    parts = {"filter": triple.filter, "input": triple.input, "output": triple.output} | {part: transform}
    return Bilinear(triple.name, parts["filter"], parts["input"], parts["output"])


def test_matrix_operations_are_those_of_arrays() -> None:
    left, right = LEFT.array(), RIGHT.array()
    assert np.array_equal((LEFT @ RIGHT).array(), left @ right)
    assert np.array_equal(LEFT.kron(RIGHT).array(), np.kron(left, right))
    assert np.array_equal(LEFT.transposed.array(), left.T)
    assert np.array_equal(LEFT.scaled([Fraction(2), Fraction(-1)]).array(), left * [[2], [-1]])
    assert np.array_equal(diagonal([LEFT, RIGHT]).array()[2:, 3:], right)
    assert np.array_equal(side_by_side([LEFT, LEFT @ RIGHT]).array(), np.hstack([left, left @ right]))
    assert LEFT.apply([1, 2, 3]) == [-5, Fraction(3, 2)]
    assert Matrix.of(LEFT.dense) == LEFT
    assert hash(Matrix.of(LEFT.dense)) == hash(LEFT)


def test_sums_that_cancel_leave_no_zero() -> None:
    assert (Matrix.of([[1, 1]]) @ Matrix.of([[1, 2], [-1, 0]])).rows == (((1, Fraction(2)),),)


def test_transforms_apply_their_first_factor_first() -> None:
    both = Transform((RIGHT, LEFT))
    assert both.matrix == LEFT @ RIGHT
    assert both.transposed.matrix == both.matrix.transposed
    assert both.apply([1, 2]) == (LEFT @ RIGHT).apply([1, 2])
    assert (both.rows, both.columns) == (2, 2)
    nested = both.kron(Transform((LEFT,)))
    assert nested.matrix == both.matrix.kron(LEFT)
    assert len(nested.factors) == 3


def test_sizes_must_agree() -> None:
    with pytest.raises(LoweringError, match="bad: the filter transform has 2 rows, that of the input 3, and the "
                                            "output transform 2 columns; all three must be the number of products"):
        plain("bad", LEFT, RIGHT, LEFT)


@pytest.mark.parametrize("triple", [winograd(2, 3), winograd(4, 3), fft_tile(8, 3), direct(2, 3)],
                         ids=lambda t: t.name)
@pytest.mark.parametrize("part", ["filter", "input", "output"])
def test_the_proof_finds_every_wrong_coefficient(triple: Bilinear, part: str) -> None:
    transform = getattr(triple, part)
    verify(triple, correlate)
    for depth, factor in enumerate(transform.factors):
        for i, row in enumerate(factor.rows):
            for place, (j, a) in enumerate(row):
                wrong = (*row[:place], (j, a + Fraction(1, 1 << 40)), *row[place + 1:])
                rows = (*factor.rows[:i], wrong, *factor.rows[i + 1:])
                factors = list(transform.factors)
                factors[depth] = replace(factor, rows=rows)
                changed = Transform(tuple(factors))
                if changed.matrix == transform.matrix:  # it meets only the zeros that pad a filter
                    continue
                with pytest.raises(LoweringError, match="not what the definition gives"):
                    verify(with_part(triple, part, changed), correlate)


def test_the_proof_says_which_outputs_are_wrong() -> None:
    swapped = plain("swapped", Matrix.of([[1]] * 3), Matrix.identity(3), Matrix.of([[1, 0, 0], [0, 0, 1], [0, 1, 0]]))
    with pytest.raises(LoweringError, match=r"swapped: outputs \[1, 2\] of 3 are not"):
        verify(swapped, correlate)


def test_the_proof_needs_the_definition_of_the_same_problem() -> None:
    with pytest.raises(LoweringError, match=r"winograd\(4,3\): it has 4 outputs where the definition has 2; give"):
        verify(winograd(4, 3), partial(correlate, stride=2))


@pytest.mark.parametrize(("rows", "columns"), [
    (winograd(2, 3), winograd(2, 3)), (winograd(4, 3), winograd(2, 3)), (winograd(4, 3), winograd(4, 3)),
    (winograd(6, 3), winograd(6, 3)), (winograd(2, 5), winograd(2, 5)), (winograd(4, 5), winograd(4, 5)),
    (winograd(2, 7), winograd(2, 7)), (winograd(4, 3), direct(3, 1)), (direct(1, 5), winograd(2, 2)),
    (fft_tile(8, 3), fft_tile(8, 5)), (fft_tile(4, 2), winograd(3, 2)),
], ids=lambda t: t.name)
def test_products_of_two_triples_convolve_in_two_dimensions(rows: Bilinear, columns: Bilinear) -> None:
    both = kronecker(rows, columns)
    assert both.rank == rows.rank * columns.rank
    verify(both, partial(correlate_2d, r=rows.filter.columns, s=columns.filter.columns,
                         width=columns.input.columns))


def test_space_with_blocks_of_channels() -> None:
    both = kronecker(strassen(), winograd(2, 3))

    def definition(w: Sequence[int], x: Sequence[int]) -> list[int]:
        """A 2 x 2 product whose elements are correlations."""
        y = []
        for m in range(2):
            for p in range(2):
                parts = [correlate(w[3 * (2 * m + c):][:3], x[4 * (2 * c + p):][:4]) for c in range(2)]
                y += [a + b for a, b in zip(*parts, strict=True)]
        return y

    assert both.rank == 7 * 4
    verify(both, definition)


@pytest.mark.parametrize("m", [1, 2, 4, 5])
@pytest.mark.parametrize("r", [1, 2, 3, 7])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_splits(m: int, r: int, parts: int) -> None:
    verify(split_stride(m, r, parts, winograd), partial(correlate, stride=parts))
    verify(split_dilation(m, r, parts, winograd), partial(correlate, dilation=parts))
    verify(split_taps(m, r, parts, winograd), correlate)


def test_splits_need_fewer_products() -> None:
    assert split_stride(4, 3, 2, winograd).rank == 5 + 4  # F(4, 2) and F(4, 1); the definition takes 12
    assert split_dilation(8, 3, 2, winograd).rank == 2 * 6  # twice F(4, 3); 24
    assert split_taps(4, 11, 4, winograd).rank == 7 + 7 + 6  # F(4, 4) twice, F(4, 3); 44
    assert split_stride(4, 3, 2, winograd).name == "stride 2: winograd(4,2) + direct(4,1)"


def test_pieces_of_different_depth() -> None:
    def build(m: int, r: int) -> Bilinear:
        return fft_tile(8, r) if m + r - 1 == 8 else winograd(m, r)

    mixed = split_taps(6, 5, 3, build)
    assert mixed.name == "taps 3: fft(8,3) + winograd(6,2)"
    verify(mixed, correlate)


def test_nested_strassen_has_its_blocks_in_blocks() -> None:
    size = 4
    order = [8 * (m // 2) + 4 * (c // 2) + 2 * (m % 2) + c % 2 for m in range(size) for c in range(size)]

    def definition(w: Sequence[int], x: Sequence[int]) -> list[int]:
        y = matrix_product([w[i] for i in order], [x[i] for i in order], size)
        return [y[order.index(i)] for i in range(size * size)]

    verify(strassen(2), definition)
