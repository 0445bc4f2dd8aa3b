"""Strassen's product: blocks of matrices, one level and two."""

from __future__ import annotations

import numpy as np
import pytest

from convsched.algebra.bilinear import verify
from convsched.algebra.strassen import matrix_product, strassen
from convsched.errors import LoweringError


def blocks(matrix: np.ndarray, levels: int) -> list[np.ndarray]:
    """The 4^levels blocks in the order of the triple: outer blocks first, each row by row."""
    if levels == 0:
        return [matrix]
    rows = np.split(matrix, 2, axis=0)
    return [inner for row in rows for block in np.split(row, 2, axis=1) for inner in blocks(block, levels - 1)]


def test_seven_products() -> None:
    triple = verify(strassen(), lambda w, x: matrix_product(w, x, 2))
    assert triple.rank == 7
    assert [len(part.factors) for part in (triple.filter, triple.input, triple.output)] == [3, 3, 3]
    assert strassen(2).rank == 49


@pytest.mark.parametrize("levels", [1, 2])
def test_blocks_of_rectangular_matrices(levels: int) -> None:
    generator = np.random.default_rng(5)
    w, x = generator.integers(-9, 10, (8, 12)), generator.integers(-9, 10, (12, 20))
    triple = strassen(levels)
    products = [a @ b for a, b in zip(triple.filter.apply(blocks(w, levels)), triple.input.apply(blocks(x, levels)),
                                      strict=True)]
    for found, expected in zip(triple.output.apply(products), blocks(w @ x, levels), strict=True):
        assert np.array_equal(found, expected)


def test_levels_must_be_positive() -> None:
    with pytest.raises(LoweringError, match=r"strassen\(0\): 0 levels; must be 1 or more"):
        strassen(0)
