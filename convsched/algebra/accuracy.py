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
from math import log, pi, sqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from convsched.algebra.bilinear import Bilinear, Matrix, Transform, direct
from convsched.errors import ProblemError
from convsched.options import ACCURACIES, Accuracy

UNIT = 2.0**-24
MEAN_ROUNDOFF = 0.42
"""Root mean square of a rounding's relative error over u: sqrt(E[1/m²] / 3) of a mantissa 1 <= m < 2, log-uniform."""

BOUNDS: dict[Accuracy, float] = {"strict": 1e-5, "normal": 5e-5, "fast": 2e-4}
"""The greatest max |error| / rms(output) to be expected that each class allows, adverse data included."""

BINS = 1000  # of deviations, each counted as the greatest in its bin
DRAWN = 128  # filters, and as many tiles, for an adverse error; half of them for large algorithms

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
        return max(self.expected, self.adverse) <= BOUNDS[accuracy]

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
    step = channels if block is None else min(block, channels)
    for name, count in (("channels", channels), ("outputs", outputs), ("block", step)):
        if count < 1:
            raise ProblemError("predict", name, count, "must be 1 or more")
    blocks = channels / step
    A, B, C = triple.filter, triple.input, triple.output
    filters, inputs, output = _product(A), _product(B), _product(C)
    a, b = np.square(filters).sum(1), np.square(inputs).sum(1)
    terms = channels * np.rint(output @ (filters.sum(1) * inputs.sum(1)))  # products w_i x_j in each output
    rounded, input_noise = _rounded(filters), _noise(B, np.ones(B.columns))
    noise = channels * (a * b * rounded + a * input_noise)
    normal = (np.square(output) @ noise + _noise(C, channels * a * b)) / terms
    walk = np.abs(output) * np.sqrt(a * b) / np.sqrt(terms)[:, np.newaxis]
    walks = [(blocks, walk * sqrt(step * (step + 1)))]
    if blocks > 1:
        walks.append((1, walk * sqrt(step * blocks * (blocks + 1))))
    expected = UNIT * MEAN_ROUNDOFF * _greatest(normal, walks, outputs)
    throughout = terms_each > 1 and not input_noise.any()
    at_full_size = (step + blocks) / (1 if throughout else 2)
    sigma = _concentrated(filters, inputs, output, input_noise, rounded.astype(float) + at_full_size,
                          _noise(C, a * b) / (np.square(output) @ (a * b)), terms_each)
    adverse = UNIT * MEAN_ROUNDOFF * _exceeded(sigma / sqrt(float(terms.min()) / channels), outputs)

    path = 1 + _roundings(B) + _roundings(C) + step + blocks
    sizes = np.linalg.norm(_product(A, absolute=True), axis=1) * np.linalg.norm(_product(B, absolute=True), axis=1)
    gains = _product(C, absolute=True) @ sizes
    gamma = path * UNIT / (1 - path * UNIT)
    ratio = channels * sqrt(A.columns * B.columns) / np.sqrt(terms)
    return Prediction(expected, adverse, float(gamma * np.max(gains * ratio)), float(gamma * np.max(gains)))


def _concentrated(filters: Floats, inputs: Floats, output: Floats, input_noise: Floats, roundings: Floats,
                  output_noise: Floats, terms: int) -> Floats:
    """Standard deviations of the errors of one channel, for each filter and tile drawn, over u MEAN_ROUNDOFF; of the
    output of a tile that has the most.

    The channel has ``terms`` of each sum. The products are rounded ``roundings`` times at their full size;
    ``input_noise`` and ``output_noise`` are the variances that the transforms add, the latter over that of the output.
    """
    random, count = np.random.default_rng(0), DRAWN if len(filters) <= DRAWN else DRAWN // 2
    u = random.standard_normal((count, terms, filters.shape[1])) @ filters.T
    tiles = random.standard_normal((count, terms, inputs.shape[1]))
    products = np.square(np.einsum("fkp,tkp->ftp", u, tiles @ inputs.T)) / terms
    level = np.square(tiles).mean(2)
    rounded = np.einsum("fkp,tk->ftp", np.square(u), level) / terms * input_noise
    variances = rounded + products * roundings
    most = int(np.argmax(np.square(output) @ variances.mean((0, 1))))
    weights = np.square(output[most])
    found: Floats = np.sqrt(variances @ weights + products @ weights * output_noise[most])
    return found


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
    found = float("inf")
    for t in 0.999 * most * np.geomspace(0.01, 1, 60):
        cumulants = normal * t * t / 2
        for times, scales in walks:
            cumulants = cumulants - times / 2 * np.log(np.cos(scales * t)).sum(1)
        top = float(np.max(cumulants))
        total = top + log(2 * outputs / len(normal) * float(np.exp(cumulants - top).sum()))
        found = min(found, total / float(t))
    return found


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
