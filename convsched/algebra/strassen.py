"""Strassen's product of matrices in 2 x 2 blocks, ⟨2,2,2;7⟩, in Winograd's variant with 15 additions.

    y_mp = sum_c w_mc x_cp,  m, c, p < 2

w, x and y hold their blocks row by row. For a 1x1 convolution the blocks are halves of the output channels, of
the input channels and of the points: 7 products of half the size in each dimension take the place of 8. The
variant's 15 additions (4 of w, 4 of x, 7 of y) need their shared sums, so each transform has several factors.

Source: Strassen, "Gaussian elimination is not optimal", 1969; Higham, "Accuracy and Stability of Numerical
Algorithms", 2002, section 23.1 (Winograd's variant, and the errors of both).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce

from convsched.algebra.bilinear import Bilinear, Matrix, Transform, kronecker, verify
from convsched.errors import LoweringError


def _factors(*levels: str) -> Transform:
    """A factor for every level after the first; a word is a value of the level before, or ``name=u+v``, ``u-v``."""
    known = [word.split("=")[0] for word in levels[0].split()]
    factors = []
    for level in levels[1:]:
        words = [word.split("=") for word in level.split()]
        sums = [word[-1].replace("-", " -").replace("+", " ").split() for word in words]
        factors.append(Matrix.of([[(name in terms) - (f"-{name}" in terms) for name in known] for terms in sums]))
        known = [word[0] for word in words]
    return Transform(tuple(factors))


FILTER = _factors("w00 w01 w10 w11",
                  "w00 w01 w11 s1=w10+w11 s3=w00-w10",
                  "w00 w01 w11 s1 s2=s1-w00 s3",
                  "w00 w01 s4=w01-s2 w11 s1 s2 s3")
INPUT = _factors("x00 x01 x10 x11",
                 "x00 x10 x11 t1=x01-x00 t3=x11-x01",
                 "x00 x10 x11 t1 t2=x11-t1 t3",
                 "x00 x10 x11 t4=t2-x10 t1 t2 t3")
OUTPUT = _factors("p1 p2 p3 p4 p5 p6 p7",
                  "y00=p1+p2 u2=p1+p6 p3 p4 p5 p7",
                  "y00 u3=u2+p7 u4=u2+p5 p3 p4 p5",
                  "y00 y01=u4+p3 y10=u3-p4 y11=u3+p5")


@cache
def strassen(levels: int = 1) -> Bilinear:
    """⟨2,2,2;7⟩ nested ``levels`` times: 7^levels products of blocks in place of 8^levels; proved.

    With two levels, block (m, c) of w is at index 8 m1 + 4 c1 + 2 m0 + c0 for m = 2 m1 + m0 and c = 2 c1 + c0; so
    for x and y. Raises LoweringError for fewer levels than one.
    """
    if levels < 1:
        raise LoweringError(f"strassen({levels}): {levels} levels; must be 1 or more")
    one = verify(Bilinear("strassen(1)", FILTER, INPUT, OUTPUT), lambda w, x: matrix_product(w, x, 2))
    nested = reduce(kronecker, [one] * levels)
    return Bilinear(f"strassen({levels})", nested.filter, nested.input, nested.output)


def matrix_product(w: Sequence[int], x: Sequence[int], size: int) -> list[int]:
    """The product of two square matrices, given and returned row by row.

    >>> matrix_product([1, 2, 3, 4], [5, 6, 7, 8], 2)
    [19, 22, 43, 50]
    """
    steps = range(size)
    return [sum(w[size * m + c] * x[size * c + p] for c in steps) for m in steps for p in steps]
