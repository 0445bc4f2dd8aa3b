"""The error of an algorithm in float32, predicted from its matrices before anything is compiled.

All errors are max |error| / rms(output) against exact arithmetic; u = 2^-24 is the unit roundoff of float32.

Expected. Every rounding is taken for an independent error of `MEAN_ROUNDOFF` u times the rounded value in the
mean square, and data for independent with mean zero. Then the error of one output is a sum of

- normal errors, from rounding filters once, from the input transform and from the output transform: a row of
  a transform has the norm of its coefficients, and each of its partial sums is rounded;
- for each product, the errors of a sum of K terms one by one. Its partial sums are a random walk W, and its error
  is normal with the variance of the integral of W²: a hyperbolic secant distribution, with the cumulants
  -ln(cos(c t)) / 2 for c = |C| |A| |B| K. Its variance is c² / 2, and its tails are much longer than normal ones.

The greatest of N such errors is at most inf over t of (ln 2N + K(t)) / t in the mean, with K(t) the sum of all
cumulants. That is what is expected.

Adverse. Where one channel is far greater than all others, nothing is averaged over channels: an error's variance
depends on one filter and one tile, and partial sums have their full size from there on: for half of their terms in
the mean. Where sums alone round and a channel has several of their terms, all of them are counted, as measured errors
of direct convolution ask (`bench/errors.py`); with one term they stay below the mean. Over independent filters and
tiles, of which some are drawn, the errors are a mixture of normal ones; the greatest of N is below z four times in
five for N mean(P(|error| > z)) = 1 / 5.

Worst. Every rounding goes the same way at its greatest. With |M| for the product of the absolute factors of a
transform, and n for the roundings on the longest path from input to output,

    |error| <= γ_n  (sum_ρ |C|_ρ |A|_ρ |B|_ρ)  |w| |x|,    γ_n = n u / (1 - n u)

in 2-norms of the filter and of the tile over all channels (rows of A and B by their norms). This holds for all
data that neither overflows nor underflows.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapters 3 and 4 (γ_n; sums, also in
blocks); Boucheron, Lugosi and Massart, "Concentration Inequalities", 2013, theorem 2.5 (the greatest of N); Pitman
and Yor, "Infinitely divisible laws associated with hyperbolic functions", 2003 (the integral of W²); Barabasz,
Anderson, Soodhalter and Gregg, "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural
Networks", 2018 (the bound by norms of the matrices); Vincent, Stephano, Frumkin, Ginsburg and Demouth, "On
Improving the Numerical Stability of Winograd Convolutions", 2017 (the condition of the transforms).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from convsched.algebra.bilinear import Bilinear, Matrix, Transform, direct
from convsched.errors import ProblemError
from convsched.lazy import importing
from convsched.options import ACCURACIES, Accuracy

UNIT = 2.0**-24
MEAN_ROUNDOFF = 0.42
"""Root mean square of a rounding's relative error over u: sqrt(E[1/m²] / 3) of a mantissa 1 <= m < 2, log-uniform."""

BOUNDS: dict[Accuracy, float] = {"strict": 1e-5, "normal": 5e-5, "fast": 2e-4}
"""The greatest max |error| / rms(output) to be expected that each class allows, adverse data included."""

BINS = 1000  # of deviations, each counted as the greatest in its bin
DRAWS = 128  # filters, and as many tiles, for an adverse error; half of them for large algorithms

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """What is to be expected of an algorithm's errors.

    ``expected``: of the greatest of all errors, over rms(output), for independent data without zeros.
    ``adverse``: the same where one input channel is far greater than all others.
    ``worst``: never exceeded by max |error| / rms(output) where all filters and all tiles have the same norm and
    the outputs the rms that independent data gives them.
    ``norm_bound``: max |error| <= norm_bound max |w| max |x| for all data, in 2-norms of what the matrices take at
    once, over all input channels: one output channel's filter and one tile; of Strassen's blocks, the filters of
    2^levels output channels and as many pixels, or tiles.
    """

    expected: float
    adverse: float
    worst: float
    norm_bound: float

    def allowed(self, accuracy: Accuracy) -> bool:
        """Whether the class of accuracy takes the algorithm."""
        return self.greatest <= BOUNDS[accuracy]

    @property
    def greatest(self) -> float:
        """What is to be expected of either kind of data: what classes of accuracy bound."""
        return max(self.expected, self.adverse)

    @property
    def accuracy(self) -> Accuracy | None:
        """The strictest class that takes the algorithm, None if none does."""
        return next((name for name in ACCURACIES if self.allowed(name)), None)


def predict_direct(terms: int, outputs: int, block: int | None = None, taps: int = 1) -> Prediction:
    """The prediction for sums of ``terms`` = C/groups R S products, accumulated one by one in float32.

    With ``block`` each sum of so many products starts from zero and is then added to the total. A channel has
    ``taps`` = R S of the terms.

    >>> [f"{predict_direct(9 * 512, 100_000, block).expected:.1e}" for block in (None, 64)]
    ['1.6e-05', '2.0e-06']
    """
    return predict(direct(1, 1), terms, outputs, block, taps)


def predict(triple: Bilinear, channels: int, outputs: int, block: int | None = None,
            terms_each: int = 1) -> Prediction:
    """The prediction for a triple whose products are sums over ``channels``, in blocks as in `predict_direct`.

    For Strassen ``channels`` are those of one block. ``terms_each`` of them belong to one channel of the layer. Raises
    ProblemError for counts below one.
    """
    return Gains.of(triple, terms_each).predict(channels, outputs, block)


@dataclass(frozen=True, eq=False)
class Gains:
    """What becomes of errors in a triple, however many channels and outputs there are: made once for many layers.

    ``normal`` (position) are the variances of normal errors of an output, ``walk`` (position, product) the scales of
    the errors of sums, ``terms`` (position) the products w_i x_j of one channel in an output. ``path`` counts the
    roundings of the transforms; ``worst`` and ``norm`` bound by what the errors grow.
    """

    normal: Floats
    walk: Floats
    terms: Floats
    path: int
    worst: float
    norm: float
    drawn: _Drawn

    @staticmethod
    def of(triple: Bilinear, terms_each: int = 1) -> Gains:
        """Those of a triple, of which one channel of the layer has so many terms of each sum."""
        A, B, C = triple.filter, triple.input, triple.output
        filters, inputs, output = _product(A), _product(B), _product(C)
        a, b = np.square(filters).sum(1), np.square(inputs).sum(1)
        terms = np.rint(output @ (filters.sum(1) * inputs.sum(1)))
        rounded, input_noise, output_noise = _rounded(filters), _noise(B, np.ones(B.columns)), _noise(C, a * b)
        normal = (np.square(output) @ (a * b * rounded + a * input_noise) + output_noise) / terms
        walk = np.abs(output) * np.sqrt(a * b) / np.sqrt(terms)[:, np.newaxis]
        sizes = np.prod([np.linalg.norm(_product(side, absolute=True), axis=1) for side in (A, B)], axis=0)
        gains = _product(C, absolute=True) @ sizes
        worst = float(np.max(gains * sqrt(A.columns * B.columns) / np.sqrt(terms)))
        drawn = _Drawn.of(filters, inputs, terms_each, np.square(output), input_noise, rounded.astype(float),
                          output_noise / (np.square(output) @ (a * b)))
        return Gains(normal, walk, terms, 1 + _roundings(B) + _roundings(C), worst, float(np.max(gains)), drawn)

    def predict(self, channels: int, outputs: int, block: int | None = None) -> Prediction:
        """The prediction for so many channels and outputs; see `predict`."""
        step = channels if block is None else min(block, channels)
        for name, count in (("channels", channels), ("outputs", outputs), ("block", step)):
            if count < 1:
                raise ProblemError("predict", name, count, "must be 1 or more")
        blocks = channels / step
        walk = self.walk / sqrt(channels)
        walks = [(blocks, walk * sqrt(step * (step + 1)))]
        if blocks > 1:
            walks.append((1, walk * sqrt(step * blocks * (blocks + 1))))
        expected = UNIT * MEAN_ROUNDOFF * _greatest(self.normal, walks, outputs)
        sigma = self.drawn.deviations(step + blocks) / sqrt(float(self.terms.min()))
        adverse = UNIT * MEAN_ROUNDOFF * _exceeded(sigma, outputs)
        path = self.path + step + blocks
        gamma = path * UNIT / (1 - path * UNIT)
        return Prediction(expected, adverse, gamma * self.worst * sqrt(channels), gamma * self.norm)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """One channel's filters and tiles, some of which are drawn, for adverse errors.

    ``filters`` and ``tiles`` (drawn, term, product) are transformed, ``level`` (drawn, term) the mean squares of tiles
    before that; ``mean`` (product) are the mean squares of products. ``weights`` (position, product) are the squares of
    the output transform. ``rounded`` (product) is 1 for filters that are rounded; ``input_noise`` (product) and
    ``output_noise`` (position) are the variances that the transforms add, the latter over that of the output.
    """

    filters: Floats
    tiles: Floats
    level: Floats
    mean: Floats
    weights: Floats
    input_noise: Floats
    rounded: Floats
    output_noise: Floats

    @staticmethod
    def of(filters: Floats, inputs: Floats, terms: int, weights: Floats, input_noise: Floats, rounded: Floats,
           output_noise: Floats) -> _Drawn:
        """Those of a channel that has so many terms of each sum."""
        with importing:  # NumPy imports it at its first use
            from numpy.random import default_rng
        random, count = default_rng(0), DRAWS if len(filters) <= DRAWS else DRAWS // 2
        u = random.standard_normal((count, terms, filters.shape[1])) @ filters.T
        tiles = random.standard_normal((count, terms, inputs.shape[1]))
        v = tiles @ inputs.T
        mean = (np.einsum("fkp,flp->klp", u, u) * np.einsum("tkp,tlp->klp", v, v)).sum((0, 1)) / (terms * count**2)
        return _Drawn(u, v, np.square(tiles).mean(2), mean, weights, input_noise, rounded, output_noise)

    def deviations(self, roundings: float) -> Floats:
        """Standard deviations of the errors for each filter and tile, over u MEAN_ROUNDOFF, of sums that round so
        often; of the output of a tile that has the most. Where sums alone round, all is at its full size."""
        terms = self.filters.shape[1]
        throughout = terms > 1 and not self.input_noise.any()
        each = self.rounded + roundings / (1 if throughout else 2)
        squares = np.square(self.filters)
        noise = squares.mean(0).T @ self.level.mean(0) / terms * self.input_noise
        most = int(np.argmax(self.weights @ (noise + self.mean * each)))
        weights = self.weights[most]
        rounded = np.einsum("fk,tk->ft", squares @ (self.input_noise * weights), self.level) / terms
        found: Floats = np.sqrt(rounded + self._products(weights * (each + self.output_noise[most])))
        return found

    def _products(self, weights: Floats) -> Floats:
        """The squares of the products of each filter and tile, in a weighted sum. Without matrix products of a library,
        whose threads take longer to start than these sums."""
        if self.filters.shape[1] == 1:
            squares, others = np.square(self.filters[:, 0]) * weights, np.square(self.tiles[:, 0])
            done: Floats = np.einsum("fp,tp->ft", squares, others)
        else:
            pairs = np.einsum("fkp,tkp->ftp", self.filters, self.tiles)
            done = np.square(pairs) @ weights / self.filters.shape[1]
        return done


def _exceeded(sigma: Floats, count: int) -> float:
    """The z below which ``count`` normal errors stay four times in five, their deviations drawn from ``sigma``: by
    bisection, with Mills' bound of the tail of a normal distribution."""
    most = float(sigma.max()) or 1.0
    many, ends = np.histogram(sigma, BINS, (0.0, most))
    low, high = 0.0, 12 * most
    for _ in range(16):
        z = (low + high) / 2
        y = np.maximum(z / ends[1:], 1.0)
        share = float((many * np.exp(-y * y / 2) / y).sum()) * sqrt(2 / pi) / sigma.size
        low, high = (z, high) if 5 * count * share > 1 else (low, z)
    return high


def _greatest(normal: Floats, walks: list[tuple[float, Floats]], outputs: int) -> float:
    """inf over t of (ln 2N + K(t)) / t, N / len(normal) errors for each position in a tile.

    ``walks`` holds the scales c (position, product) of each kind of sum, and how many of the kind there are.
    """
    most = pi / 2 / max(float(np.max(scales)) for _, scales in walks)
    t = (0.999 * most * np.geomspace(0.01, 1, 60))[:, np.newaxis]
    cumulants = normal * t * t / 2
    for times, scales in walks:
        kinds, inverse = np.unique(scales, return_inverse=True)
        cumulants = cumulants - times / 2 * np.log(np.cos(kinds * t))[:, inverse.reshape(scales.shape)].sum(2)
    top = cumulants.max(1)
    totals = top + np.log(2 * outputs / len(normal) * np.exp(cumulants - top[:, np.newaxis]).sum(1))
    return float(np.min(totals / t[:, 0]))


def _product(transform: Transform, absolute: bool = False) -> Floats:
    """The matrix of a transform, or the product of the absolute values of its factors."""
    done: Floats = np.eye(transform.columns)
    for factor in transform.factors:
        done = _times(factor, done, absolute)
    return done


def _times(factor: Matrix, values: Floats, absolute: bool = False) -> Floats:
    """A sparse factor, or its absolute values, times an array: row by row, as most of a long factor is zero."""
    coefficients = (np.array([float(a) for _, a in row]) for row in factor.rows)
    return np.stack([(np.abs(a) if absolute else a) @ values[[j for j, _ in row]]
                     for row, a in zip(factor.rows, coefficients, strict=True)])


def _noise(transform: Transform, variances: Floats) -> Floats:
    """The variance of the rounding errors of each result, in (u MEAN_ROUNDOFF)², for inputs of such variances.

    A row of k terms rounds k - 1 partial sums, in the mean of half the final variance; it rounds a product where
    no factor is a power of two, and a constant where float32 does not hold it.
    """
    done, noise, sizes = np.diag(np.sqrt(variances)), np.zeros(len(variances)), variances
    for matrix in transform.factors:
        factor = matrix.array()
        inexact = np.square(factor * (factor != factor.astype(np.float32))) @ sizes
        done = _times(matrix, done)
        sizes = np.square(done).sum(1)
        count = np.maximum(np.count_nonzero(factor, axis=1), 1)
        sums = (count + 2) * (count - 1) / (2 * count) * sizes
        noise = np.square(factor) @ noise + sums + inexact + sizes / count * ~_power(factor).any(axis=1)
    return noise


def _power(factor: Floats) -> NDArray[np.bool_]:
    """Which coefficients are powers of two: a product with one rounds nothing."""
    powers: NDArray[np.bool_] = np.abs(np.frexp(factor)[0]) == 0.5
    return powers


def _rounded(filters: Floats) -> NDArray[np.bool_]:
    """Which results of the filter transform, computed in float64, float32 does not hold."""
    rounded: NDArray[np.bool_] = (np.count_nonzero(filters, axis=1) > 1) | ~_power(filters).any(axis=1)
    return rounded


def _roundings(transform: Transform) -> int:
    """The roundings from an input to a result: of a row of k terms k - 1 sums, k products and k constants."""
    longest = 0
    for matrix in transform.factors:
        factor = matrix.array()
        count, exact = np.count_nonzero(factor, axis=1), (factor == factor.astype(np.float32)).all(axis=1)
        free = (count <= 1) & (_power(factor).any(axis=1) | (count == 0))
        longest += int(np.max(np.where(free, 0, (3 - exact) * count - 1)))
    return longest
