"""Winograd's minimal filtering: the published matrices, any size, any points."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from convsched.algebra.bilinear import correlate, direct, verify
from convsched.algebra.winograd import default_points, products, winograd, winograd_side
from convsched.errors import LoweringError

USUAL = tuple(map(Fraction, (0, 1, -1, 2, -2)))


@pytest.mark.parametrize("m", [*range(1, 8), pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("r", range(1, 8))
def test_any_size_with_the_fewest_products(m: int, r: int) -> None:
    triple = verify(winograd(m, r), correlate)
    assert triple.rank == m + r - 1
    assert (triple.filter.columns, triple.input.columns, triple.output.rows) == (r, m + r - 1, m)


def test_the_published_matrices() -> None:
    """Lavin and Gray, 2016, section 4.1, up to the signs of rows."""
    triple = winograd(2, 3)
    half = 0.5
    assert triple.filter.matrix.array().tolist() == [[1, 0, 0], [half, half, half], [half, -half, half], [0, 0, 1]]
    assert triple.input.matrix.array().tolist() == [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]]
    assert triple.output.matrix.array().tolist() == [[1, 1, 1, 0], [0, 1, -1, 1]]


@pytest.mark.parametrize(("m", "r", "stride"), [(4, 3, 1), (2, 3, 2), (4, 3, 2), (3, 5, 3), (2, 11, 1), (4, 16, 1)])
def test_sides_of_layers_are_split(m: int, r: int, stride: int) -> None:
    """Strides into phases, many taps into parts: as many products as said, and each what the definition computes."""
    triple = verify(winograd_side(m, r, stride), partial(correlate, stride=stride))
    assert triple.rank == products(m, r, stride) < m * r
    assert (triple.filter.columns, triple.input.columns, triple.output.rows) == (r, stride * (m - 1) + r, m)


def test_one_output_or_one_tap_is_the_definition() -> None:
    assert winograd(1, 3) == direct(1, 3)
    assert winograd(4, 1) == direct(4, 1)


@pytest.mark.parametrize(("m", "r", "points"), [
    (2, 3, "0 1 -1"), (4, 3, "0 3/4 -3/4 3/2 -3/2"), (6, 3, "0 1/2 -1/2 1 -1 2 -2"),
    (2, 5, "0 2/3 -2/3 3/2 -3/2"), (4, 5, "0 1/2 -1/2 1 -1 2 -2"), (2, 7, "0 1/2 -1/2 1 -1 2 -2"),
])
def test_default_points(m: int, r: int, points: str) -> None:
    assert " ".join(map(str, default_points(m, r))) == points


@pytest.mark.parametrize("n", range(3, 30))
def test_default_points_differ_for_any_size(n: int) -> None:
    assert len(set(default_points(n - 2, 3))) == n - 1


@pytest.mark.parametrize(("m", "r"), [(2, 3), (4, 3), (6, 3), (4, 5), (2, 7)])
def test_float32_holds_the_constants(m: int, r: int) -> None:
    triple = winograd(m, r)
    for matrix in (triple.input.matrix, triple.output.matrix):
        assert np.array_equal(matrix.array(), matrix.array().astype(np.float32))


def test_scales_make_ones() -> None:
    """Every row of B and every column of C has a 1 or -1, so that one of its products is none."""
    for m, r in ((4, 3), (6, 3), (2, 5), (5, 5)):
        triple = winograd(m, r)
        assert (np.abs(triple.input.matrix.array()) == 1).any(axis=1).all()
        assert (np.abs(triple.output.matrix.array()) == 1).any(axis=0).all()


def test_chosen_points() -> None:
    triple = verify(winograd(4, 3, USUAL), correlate)
    assert triple != winograd(4, 3)
    assert winograd(4, 3, default_points(4, 3)) == winograd(4, 3)


@pytest.mark.parametrize("points", [USUAL[:4], (*USUAL, Fraction(3)), (*USUAL[:4], Fraction(0))])
def test_points_must_be_enough_and_different(points: tuple[Fraction, ...]) -> None:
    with pytest.raises(LoweringError, match=r"winograd\(4,3\): points 0, 1, -1, 2.*; give 5 different ones "
                                            r"\(infinity is one more\), or none for the default"):
        winograd(4, 3, points)


@pytest.mark.parametrize(("m", "r"), [(0, 3), (4, 0), (-1, 3)])
def test_sizes_must_be_positive(m: int, r: int) -> None:
    with pytest.raises(LoweringError, match=rf"winograd\({m},{r}\): {m} outputs of {r} taps; both must be 1 or more"):
        winograd(m, r)
