"""FFT tiles: exact cosines, the factors, and tiles against the definition."""

from __future__ import annotations

from fractions import Fraction
from math import cos, pi, sin

import numpy as np
import pytest

from convsched.algebra import fft
from convsched.algebra.bilinear import correlate, verify
from convsched.algebra.fft import Cosines, cosine, fft_tile, real_fft, sine
from convsched.errors import LoweringError


@pytest.mark.parametrize("n", [4, 8, 16, 64])
def test_cosines_are_numbers(n: int) -> None:
    for k in range(-n, 2 * n):
        c, s = cosine(k, n), sine(k, n)
        assert float(c) == pytest.approx(cos(2 * pi * k / n), abs=1e-14)
        assert float(s) == pytest.approx(sin(2 * pi * k / n), abs=1e-14)
        assert c * c + s * s == 1
        assert c * c + s * s * -1 == cosine(2 * k, n)
        assert c * cosine(3, n) + s * sine(3, n) == cosine(k - 3, n)
        assert abs(c) >= abs(float(c))


def test_cosines_add_to_rationals() -> None:
    root = cosine(1, 8) * 2
    assert isinstance(root, Cosines)
    assert root * root == 2
    assert root + -1 * root == 0
    assert Fraction(1, 3) + root == root + Fraction(1, 3)
    assert (root + Fraction(1, 3)).denominator == 3
    assert float(Fraction(1, 3) * root) == pytest.approx(2**0.5 / 3)
    assert sum([root, root]) == root * 2
    assert root != 1


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64])
def test_the_real_transform_is_that_of_numpy(n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n)
    ours, theirs = real_fft(n).matrix.array() @ x, np.fft.rfft(x)
    assert ours[:2] == pytest.approx([theirs[0].real, theirs[-1].real], abs=1e-13)
    assert ours[2::2] + 1j * ours[3::2] == pytest.approx(theirs[1:-1], abs=1e-13)


@pytest.mark.parametrize("n", [2, 16, pytest.param(128, marks=pytest.mark.slow)])
def test_factors_are_sparse(n: int) -> None:
    factors = real_fft(n).factors
    assert len(factors) == n.bit_length() - 1
    assert max(len(row) for factor in factors for row in factor.rows) <= 3


def test_a_wrong_factor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fft, "sine", lambda k, n: cosine(k, n))
    real_fft.cache_clear()
    with pytest.raises(LoweringError, match="the factor to 4 elements does not give the DFT"):
        real_fft(8)
    real_fft.cache_clear()


@pytest.mark.parametrize(("n", "r"), [(2, 1), (2, 2), (4, 3), (8, 1), (8, 3), (8, 8), (16, 5), (32, 15)])
def test_small_tiles_are_proved(n: int, r: int) -> None:
    tile = verify(fft_tile(n, r), correlate)
    assert tile.rank == 3 * n // 2 - 1
    assert (tile.filter.columns, tile.input.columns, tile.output.rows) == (r, n, n - r + 1)


@pytest.mark.parametrize(("n", "r"), [(64, 33), pytest.param(128, 64, marks=pytest.mark.slow)])
def test_large_tiles_are_exact_on_random_integers(n: int, r: int) -> None:
    generator = np.random.default_rng(n)
    w, x = (generator.integers(-99, 100, size).tolist() for size in (r, n))
    assert fft_tile(n, r).compute(w, x) == correlate(w, x)


@pytest.mark.parametrize("n", [0, 1, 3, 12, -8])
def test_sizes_are_powers_of_two(n: int) -> None:
    with pytest.raises(LoweringError, match=rf"real_fft\({n}\): {n} is not a power of two from 2 on; take "):
        real_fft(n)


@pytest.mark.parametrize("r", [0, 9])
def test_taps_fit_into_the_tile(r: int) -> None:
    with pytest.raises(LoweringError, match=rf"fft_tile\(8,{r}\): {r} taps in a tile of 8; must be between 1 and 8"):
        fft_tile(8, r)
