"""FFT tiles (overlap-save): n - r + 1 outputs of r taps from n inputs, by the discrete Fourier transform.

    y = first n - r + 1 elements of  DFT⁻¹( conj(DFT w) ⊙ DFT x )

w is padded with zeros to n. The circular correlation is the plain one wherever no tap wraps around: in all but
the last r - 1 outputs. Real data has frequencies 0 and n/2 real and k, n - k conjugate, so that the transform is
the real matrix F of n rows

    Re X_0, Re X_{n/2}, and Re X_k, Im X_k for 0 < k < n/2

Its factors are those of Cooley and Tukey for real data: X_k = E_k + ω^k O_k and X_{n/2-k} = conj(E_k - ω^k O_k),
with E and O the transforms of the even and the odd elements. The rows of F are orthogonal, so F⁻¹ = Fᵀ D with
D = 1/n for the real frequencies and 2/n for the others; A takes D, as it costs nothing at bind time.

A product of conj(a + ib) and c + id by Gauss's three real ones: with p = a (c + d), q = d (a - b), s = c (a + b),
the real part is p - q and the imaginary part p - s.

Source: Cooley and Tukey, 1965; Sorensen, Jones, Heideman and Burrus, "Real-valued fast Fourier transform
algorithms", 1987; Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapter 24 and section 23.2.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product
from math import cos, fsum, lcm, pi
from typing import Any

from convsched.algebra.bilinear import ONE, Bilinear, Matrix, Number, Transform, correlate, diagonal, verify
from convsched.errors import LoweringError

PROOF_INPUTS = 32  # the proof of a whole tile takes 0.1 s for 32, seconds for 64 and minutes for 128


@dataclass(frozen=True)
class Cosines:
    """An irrational number a_0 + sum over k > 0 of a_k 2 cos(2 π k / n), exactly; n = 4 ``quarter``, a power of two.

    ``terms`` holds the pairs (k, a_k) that are not zero, by k. 1 and these cosines for k < n/4 are linearly
    independent over the rationals, so that equal numbers have equal terms; the results of arithmetic that are
    rational are Fractions.
    """

    quarter: int
    terms: tuple[tuple[int, Fraction], ...]

    @property
    def denominator(self) -> int:
        """The least number times which all a_k are integers; with integers these numbers are a ring."""
        return lcm(*(a.denominator for _, a in self.terms))

    def __add__(self, other: Any) -> Cosines | Fraction:
        sums = dict(self.terms)
        for k, a in other.terms if isinstance(other, Cosines) else ((0, other),):
            sums[k] = sums.get(k, 0) + a
        return _number(self.quarter, sums)

    def __mul__(self, other: Any) -> Cosines | Fraction:
        if not isinstance(other, Cosines):
            return _number(self.quarter, {k: a * other for k, a in self.terms})
        half = 2 * self.quarter
        sums: dict[int, Fraction] = {}
        for (j, a), (k, b) in product(self.terms, other.terms):
            # 2 cos j times 2 cos k is 2 cos(j + k) + 2 cos(j - k); 2 cos 0 is 2
            for place in (j + k, abs(j - k)) if j and k else (j + k,):
                amount = a * b * (2 if j and not place else 1)
                key, signed = (place, amount) if place <= self.quarter else (half - place, -amount)
                sums[key] = sums.get(key, 0) + signed
        sums.pop(self.quarter, None)  # cos(π / 2) is 0
        return _number(self.quarter, sums)

    __radd__ = __add__
    __rmul__ = __mul__

    def __abs__(self) -> Fraction:
        """|a_0| + 2 sum |a_k|: at least the absolute value."""
        return sum((abs(a) * (2 if k else 1) for k, a in self.terms), start=Fraction(0))

    def __float__(self) -> float:
        step = pi / (2 * self.quarter)
        return fsum(float(a) * (2 * cos(step * k) if k else 1) for k, a in self.terms)


def _number(quarter: int, terms: Mapping[int, Fraction]) -> Cosines | Fraction:
    kept = tuple((k, terms[k]) for k in sorted(terms) if terms[k])
    return Cosines(quarter, kept) if kept and kept[-1][0] else Fraction(sum(a for _, a in kept))


def cosine(k: int, n: int) -> Number:
    """cos(2 π k / n) for n = 4, 8, 16, ...

    >>> cosine(2, 4), cosine(1, 8) * cosine(1, 8), float(cosine(1, 8))
    (Fraction(-1, 1), Fraction(1, 2), 0.7071067811865476)
    """
    quarter, k = n // 4, min(k % n, -k % n)
    if k in (0, 2 * quarter):
        return ONE if k == 0 else -ONE
    if k == quarter:
        return Fraction(0)
    return Cosines(quarter, ((k, Fraction(1, 2)),) if k < quarter else ((2 * quarter - k, Fraction(-1, 2)),))


def sine(k: int, n: int) -> Number:
    """sin(2 π k / n) for a n = 4, 8, 16, ..."""
    return cosine(n // 4 - k, n)


@cache
def real_fft(n: int) -> Transform:
    """The real DFT matrix F of n = 2, 4, 8, ... elements, in log2 n factors of at most three numbers a row.

    Each factor is proved against the definition. Raises LoweringError for other n.
    """
    if n < 2 or n & (n - 1):
        raise LoweringError(f"real_fft({n}): {n} is not a power of two from 2 on; take {1 << max(n, 2).bit_length()}")
    sizes = [1 << k for k in range(1, n.bit_length())]
    levels = [_butterflies(size, max(n, 4)) for size in sizes]
    for size, level in zip(sizes, levels, strict=True):
        _prove(size, level, max(n, 4))
    order = [0]
    while len(order) < n:  # bits reversed: the even elements, then the odd ones, each in such an order
        order = [2 * i for i in order] + [2 * i + 1 for i in order]
    first, *rest = (diagonal([level] * (n // size)) for size, level in zip(sizes, levels, strict=True))
    return Transform((first @ Matrix.select(order, n), *rest))


def _definition(size: int, n: int) -> Matrix:
    """F of ``size`` elements: X_k = sum_j x_j (cos(2 π j k / size) - i sin(2 π j k / size))."""
    step = n // size
    rows = [[cosine(step * j * k, n) for j in range(size)] for k in sorted({0, size // 2})]
    for k in range(1, size // 2):
        rows += [[cosine(step * j * k, n) for j in range(size)], [-ONE * sine(step * j * k, n) for j in range(size)]]
    return Matrix.of(rows)


def _prove(size: int, level: Matrix, n: int) -> None:
    """Raise LoweringError unless the level makes F of the size from the definitions of both halves."""
    halves = diagonal([_definition(size // 2, n)] * 2)
    split = Matrix.select([*range(0, size, 2), *range(1, size, 2)], size)
    if level @ halves @ split != _definition(size, n):
        raise LoweringError(f"real_fft: the factor to {size} elements does not give the DFT; this is a bug, please "
                            "report it")


def _butterflies(size: int, n: int) -> Matrix:
    """From the transforms E and O of half the size, one after the other, to that of the whole."""
    half, step = size // 2, n // size
    rows: dict[int, dict[int, Number]] = {0: {0: ONE, half: ONE}, 1: {0: ONE, half: -ONE}}
    if half > 1:  # X_{size/4} = E - i O, at the half's highest frequency
        rows |= {half: {1: ONE}, half + 1: {half + 1: -ONE}}
    for k in range(1, half // 2):
        real, imaginary, c, s = 2 * k, 2 * k + 1, cosine(k * step, n), sine(k * step, n)
        rows |= {
            real: {real: ONE, half + real: c, half + imaginary: s},
            imaginary: {imaginary: ONE, half + real: s * -ONE, half + imaginary: c},
            size - real: {real: ONE, half + real: c * -ONE, half + imaginary: s * -ONE},
            size - real + 1: {imaginary: -ONE, half + real: s * -ONE, half + imaginary: c},
        }
    return Matrix(tuple(tuple(rows[i].items()) for i in range(size)), size)


@cache
def fft_tile(n: int, r: int) -> Bilinear:
    """n - r + 1 outputs of r taps from a tile of n = 2, 4, 8, ... inputs, by 3 n / 2 - 1 real products.

    Tiles of up to 32 are proved as a whole. For larger ones F is proved, and the rest is the convolution theorem.
    Raises LoweringError for other n, and unless 1 <= r <= n.
    """
    if not 1 <= r <= n:
        raise LoweringError(f"fft_tile({n},{r}): {r} taps in a tile of {n}; must be between 1 and {n}")
    forward, pairs = real_fft(n), n // 2 - 1
    filter_sums = Matrix.of([[1, 0], [1, -1], [1, 1]])  # a, a - b, a + b
    input_sums = Matrix.of([[1, 1], [0, 1], [1, 0]])  # c + d, d, c
    output_sums = Matrix.of([[1, -1, 0], [1, 0, -1]])  # p - q, p - s
    real = Matrix.identity(2)
    scales = [Fraction(1, n)] * 2 + [Fraction(2, n)] * 3 * pairs
    first, *rest = forward.factors
    padded = first @ Matrix.select(range(r), n).transposed
    *inner, last = forward.transposed.factors
    triple = Bilinear(
        f"fft({n},{r})",
        Transform((padded, *rest, diagonal([real, *[filter_sums] * pairs]).scaled(scales))),
        forward.then(diagonal([real, *[input_sums] * pairs])),
        Transform((diagonal([real, *[output_sums] * pairs]), *inner, Matrix(last.rows[:n - r + 1], last.columns))))
    return verify(triple, correlate) if n <= PROOF_INPUTS else triple


def part_of_tile(n: int, r: int, m: int) -> Bilinear:
    """The first m outputs of ``fft_tile(n, r)``, from the m + r - 1 inputs that they need, by 3 n / 2 products.

    The last product is one of zeros: 3 n / 2 is a multiple of many register tiles. Raises LoweringError unless
    m + r - 1 <= n.
    """
    whole, inputs = fft_tile(n, r), m + r - 1
    if not 1 <= m <= n - r + 1:
        raise LoweringError(f"fft({n}): a tile of {n} has up to {n - r + 1} outputs of {r} taps, not {m}")
    rank, products = whole.rank, 3 * n // 2
    padded = Matrix((*Matrix.identity(rank).rows, *((),) * (products - rank)), rank)
    first = whole.input.factors[0] @ Matrix.select(range(inputs), n).transposed
    last = whole.output.factors[-1]
    output = (whole.output.factors[0] @ padded.transposed, *whole.output.factors[1:-1])
    return Bilinear(
        f"fft({n},{r})", whole.filter.then(padded), Transform((first, *whole.input.factors[1:], padded)),
        Transform((*output, Matrix(last.rows[:m], last.columns))))
