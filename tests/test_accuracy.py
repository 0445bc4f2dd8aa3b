"""Predicted errors against those of float32, for every algorithm and for data of several kinds.

The simulation rounds as a kernel does: filters once, from float64; transforms as their programs of sums; sums over
channels one by one; all with fused multiply-add, which is float64 arithmetic rounded to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, reduce
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convsched.algebra.accuracy import BOUNDS, Prediction, predict, predict_direct
from convsched.algebra.bilinear import Bilinear, Transform, direct, kronecker
from convsched.algebra.fft import fft_tile
from convsched.algebra.strassen import strassen
from convsched.algebra.sums import shared_sums
from convsched.algebra.winograd import winograd
from convsched.errors import ProblemError

Floats = NDArray[np.floating[Any]]
USUAL = tuple(map(Fraction, (0, 1, -1, 2, -2)))
FILTERS = TILES = 12


def squared(triple: Bilinear) -> Bilinear:
    return kronecker(triple, triple)


ALGORITHMS = {
    "F(2,3)": squared(winograd(2, 3)),
    "F(4,3)": squared(winograd(4, 3)),
    "F(4,3) usual": squared(winograd(4, 3, USUAL)),
    "F(6,3)": squared(winograd(6, 3)),
    "F(2,5)": squared(winograd(2, 5)),
    "F(4,5)": squared(winograd(4, 5)),
    "F(2,7)": squared(winograd(2, 7)),
    "F(4,3)xF(2,3)": kronecker(winograd(4, 3), winograd(2, 3)),
    "1-D F(4,3)": winograd(4, 3),
    "1-D F(4,5)": winograd(4, 5),
    "1-D F(2,7)": winograd(2, 7),
    "FFT(32,16)": fft_tile(32, 16),
    "FFT(16,7)": squared(fft_tile(16, 7)),
    "Strassen 1": strassen(),
    "Strassen 2": strassen(2),
    "F(2,3)xStrassen": kronecker(winograd(2, 3), strassen()),
}


def fused(a: Floats | np.float32, b: Floats, c: Floats) -> Floats:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def transformed(transform: Transform, values: Floats) -> Floats:
    """A transform in float32, by its programs of sums."""
    known = list(values)
    for factor in transform.factors:
        program = shared_sums(factor)
        for s in program.sums:
            a, b = np.float32(float(s.a)), np.float32(float(s.b))
            u, v = (known[s.u], known[s.v]) if abs(b) == 1 else (known[s.v], known[s.u])
            a, b = (a, b) if abs(b) == 1 else (b, a)
            known.append(fused(a, u, b * v))
        known = [known[i] for i in program.outputs]
    return np.stack(known)


def exactly(transform: Transform, values: Floats) -> Floats:
    """A transform in float64."""
    matrix = reduce(lambda done, factor: factor.array() @ done, transform.factors, np.eye(transform.columns))
    return np.tensordot(matrix, values.astype(np.float64), 1)


def data(triple: Bilinear, channels: int, kind: str) -> tuple[Floats, Floats]:
    """Filters (taps, channels, filter) and tiles (inputs, channels, tile) in float32."""
    generator = np.random.default_rng(11)
    w = generator.standard_normal((triple.filter.columns, channels, FILTERS))
    x = generator.standard_normal((triple.input.columns, channels, TILES))
    if kind == "relu":
        x = np.maximum(x, 0)
    if kind == "mean":
        x += 10
    if kind == "huge":
        x[:, channels // 3] *= 1000
    return w.astype(np.float32), x.astype(np.float32)


@dataclass(frozen=True)
class Measured:
    """Errors against float64: over rms(output) the greatest and their rms; the greatest over |w| |x|."""

    greatest: float
    mean: float
    normed: float
    outputs: int


@cache
def measured(triple: Bilinear, channels: int, kind: str = "normal", block: int | None = None) -> Measured:
    w, x = data(triple, channels, kind)
    filters, inputs = exactly(triple.filter, w).astype(np.float32), transformed(triple.input, x)
    total = part = np.zeros((triple.rank, FILTERS, TILES), np.float32)
    for c in range(channels):
        part = fused(filters[:, c, :, np.newaxis], inputs[:, c, np.newaxis, :], part)
        if block is not None and (c + 1) % block == 0:
            total, part = total + part, np.zeros_like(part)
    y = transformed(triple.output, total + part)
    products = np.einsum("kcm,kct->kmt", exactly(triple.filter, w), exactly(triple.input, x))
    exact = exactly(triple.output, products)
    errors, rms = np.abs(y - exact), np.sqrt(np.mean(exact**2))
    norms = [np.sqrt(np.square(part.astype(np.float64)).sum((0, 1)).max()) for part in (w, x)]
    return Measured(float(errors.max() / rms), float(np.sqrt(np.mean(errors**2)) / rms),
                    float(errors.max() / (norms[0] * norms[1])), errors.size)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_errors_of_independent_data_are_as_expected(name: str) -> None:
    """The greatest of some thousand errors with long tails is itself known to a factor of 2 only."""
    for channels in (32, 128):
        found = measured(ALGORITHMS[name], channels)
        prediction = predict(ALGORITHMS[name], channels, found.outputs)
        assert found.greatest / 2 < prediction.expected < 2.5 * found.greatest
        assert found.greatest < prediction.worst


@pytest.mark.parametrize("kind", ["relu", "mean", "huge"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_error_is_worse_than_the_worst(name: str, kind: str) -> None:
    found = measured(ALGORITHMS[name], 32, kind)
    prediction = predict(ALGORITHMS[name], 32, found.outputs)
    assert found.normed < prediction.norm_bound
    assert found.greatest < prediction.worst


@pytest.mark.parametrize("kind", ["relu", "mean"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_zeros_and_means_do_no_more_than_expected(name: str, kind: str) -> None:
    found = measured(ALGORITHMS[name], 32, kind)
    assert found.greatest < 1.5 * predict(ALGORITHMS[name], 32, found.outputs).expected


@pytest.mark.parametrize("channels", [64, 256])
def test_errors_relative_to_direct(channels: int) -> None:
    """The issue's figures: F(2, 3) is more accurate than direct float32, F(4, 3) at most 2.5 times worse."""
    plain = measured(direct(1, 1), 9 * channels).mean
    assert measured(ALGORITHMS["F(2,3)"], channels).mean < plain
    assert measured(ALGORITHMS["F(4,3)"], channels).mean < 2.5 * plain
    assert measured(ALGORITHMS["F(4,3)"], channels).mean < 0.6 * measured(ALGORITHMS["F(4,3) usual"], channels).mean


@pytest.mark.parametrize(("terms", "block"), [(300, None), (2304, None), (2304, 64), (100, 400), (1, None)])
def test_sums_one_by_one_and_in_blocks(terms: int, block: int | None) -> None:
    found = measured(direct(1, 1), terms, "normal", block)
    prediction = predict_direct(terms, found.outputs, block)
    assert found.greatest / 2 < prediction.expected < 2.5 * found.greatest
    assert found.greatest < prediction.worst


def test_a_bound_that_data_comes_near() -> None:
    """1 + u / 2 is rounded down in every step: the error is the greatest that sums of equal terms can have."""
    small = np.float32(2.0**-25)
    total = np.float32(1)
    for _ in range(999):
        total = total + small
    error = 999 * 2.0**-25
    assert total == 1
    norm = np.sqrt(1 + 999 * 2.0**-50)  # of the terms; all weights are 1
    assert error < predict_direct(1000, 1).norm_bound * norm * np.sqrt(1000)
    assert error > predict_direct(1000, 1).norm_bound * norm * np.sqrt(1000) / 100


def test_more_channels_and_outputs_mean_more_error() -> None:
    triple = ALGORITHMS["F(4,3)"]
    errors = [predict(triple, channels, 10_000).expected for channels in (32, 128, 512)]
    assert errors == sorted(errors)
    assert predict(triple, 128, 1_000_000).expected > predict(triple, 128, 10_000).expected
    assert predict(triple, 512, 10_000, block=64).expected < predict(triple, 512, 10_000).expected
    assert predict(triple, 512, 10_000, block=64).worst < predict(triple, 512, 10_000).worst


def test_factors_of_two_change_nothing() -> None:
    triple = winograd(4, 3)
    rank = triple.rank
    shifted = Bilinear("shifted", triple.filter.then(direct(rank, 1).output.matrix.scaled([Fraction(1, 8)] * rank)),
                       triple.input.then(direct(rank, 1).output.matrix.scaled([Fraction(8)] * rank)), triple.output)
    assert predict(shifted, 64, 1000).expected == pytest.approx(predict(triple, 64, 1000).expected)


@pytest.mark.parametrize(("errors", "classes"), [
    (BOUNDS["strict"], ["strict", "normal", "fast"]), (1.1e-5, ["normal", "fast"]), (2e-4, ["fast"]), (2.1e-4, [])])
def test_classes(errors: float, classes: Sequence[str]) -> None:
    prediction = Prediction(errors, errors / 2, 1.0, 1.0)
    assert [name for name in BOUNDS if prediction.allowed(name)] == classes
    assert [name for name in BOUNDS if Prediction(errors / 2, errors, 1.0, 1.0).allowed(name)] == classes
    assert prediction.accuracy == (classes[0] if classes else None)


@pytest.mark.parametrize(("name", "accuracy"), [
    ("F(2,3)", "strict"), ("FFT(16,7)", "strict"), ("F(4,3)", "normal"), ("F(2,5)", "normal"),
    ("Strassen 1", "normal"), ("F(6,3)", None), ("F(4,5)", "fast"), ("F(2,7)", "fast"),
])
def test_classes_of_a_common_layer(name: str, accuracy: str | None) -> None:
    """256 channels, 28 x 28 outputs."""
    assert predict(ALGORITHMS[name], 256, 256 * 28 * 28).accuracy == accuracy


@pytest.mark.parametrize(("channels", "outputs", "block", "message"), [
    (0, 10, None, "predict(channels=0): must be 1 or more"), (8, 0, None, "predict(outputs=0): must be 1 or more"),
    (8, 10, 0, "predict(block=0): must be 1 or more"),
])
def test_counts_must_be_positive(channels: int, outputs: int, block: int | None, message: str) -> None:
    with pytest.raises(ProblemError) as caught:
        predict(winograd(2, 3), channels, outputs, block)
    assert str(caught.value) == message
