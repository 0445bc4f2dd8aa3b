"""Straight-line programs: the same matrix, with fewer sums."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.algebra.bilinear import Matrix
from convsched.algebra.fft import fft_tile
from convsched.algebra.strassen import strassen
from convsched.algebra.sums import Sum, shared_factors, shared_sums
from convsched.algebra.winograd import winograd

NUMBERS = st.sampled_from([Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-3, 4), Fraction(1, 3)])


@st.composite
def matrices(draw: st.DrawFn) -> Matrix:
    columns = draw(st.integers(1, 5))
    return Matrix.of(draw(st.lists(st.lists(NUMBERS, min_size=columns, max_size=columns), min_size=1, max_size=5)))


@given(matrices())
def test_any_matrix(matrix: Matrix) -> None:
    program = shared_sums(matrix)
    units = [[Fraction(i == j) for i in range(matrix.columns)] for j in range(matrix.columns)]
    assert [program.run(unit) for unit in units] == [list(row) for row in matrix.transposed.dense]
    assert program.additions <= sum(max(0, len(row) - 1) for row in matrix.rows)
    for number, s in enumerate(program.sums):
        assert max(s.u, s.v) < matrix.columns + number


@pytest.mark.parametrize(("m", "r", "inputs", "outputs"), [
    (2, 3, 4, 4), (4, 3, 12, 10), (2, 5, 12, 8), (6, 3, 24, 20), (4, 5, 24, 16), (2, 7, 24, 12),
])
def test_opposite_points_halve_the_work(m: int, r: int, inputs: int, outputs: int) -> None:
    triple = winograd(m, r)
    counts = [shared_sums(part.matrix).additions for part in (triple.input, triple.output)]
    assert counts == [inputs, outputs]
    assert shared_sums(triple.input.matrix).operations == inputs  # no multiplication that is not fused


@pytest.mark.parametrize(("m", "r", "inputs", "outputs"), [(2, 3, 1, 1), (4, 3, 2, 2), (6, 3, 2, 2), (4, 5, 2, 2)])
def test_factors_compute_shared_sums_once(m: int, r: int, inputs: int, outputs: int) -> None:
    """Their product is the matrix, and they cost no more than the sums they came from."""
    for part, depth in ((winograd(m, r).input, inputs), (winograd(m, r).output, outputs)):
        found = shared_factors(part.matrix)
        assert found.matrix == part.matrix
        assert len(found.factors) == depth
        work = sum(max(len(row) - 1, 0) for factor in found.factors for row in factor.rows)
        assert work <= shared_sums(part.matrix).additions + 1


def test_strassen_takes_fifteen_additions() -> None:
    counts = [sum(shared_sums(factor).operations for factor in part.factors)
              for part in (strassen().filter, strassen().input, strassen().output)]
    assert counts == [4, 4, 7]


@pytest.mark.parametrize("n", [16, 64, pytest.param(128, marks=pytest.mark.slow)])
def test_transforms_cost_n_log_n(n: int) -> None:
    tile = fft_tile(n, n // 2)
    levels = n.bit_length() - 1
    for part in (tile.input, tile.output):
        assert sum(shared_sums(factor).operations for factor in part.factors) < 2 * n * levels


def test_operations_of_a_sum() -> None:
    half, one, zero = Fraction(1, 2), Fraction(1), Fraction(0)
    pairs = ((one, -one), (one, half), (half, half), (half, zero))
    assert [Sum(a, 0, b, 1).operations for a, b in pairs] == [1, 1, 2, 1]


def test_rows_that_need_no_sum() -> None:
    program = shared_sums(Matrix.of([[0, 1], [0, 0], [3, 0], [3, 0]]))
    assert program.outputs[0] == 1
    assert program.outputs[2] == program.outputs[3]
    assert program.additions == 0
    assert program.run([5, 7]) == [7, 0, 15, 15]


def test_equal_matrices_give_equal_programs() -> None:
    matrix = winograd(6, 3).input.matrix
    assert shared_sums(matrix) == shared_sums(Matrix.of(matrix.dense))
