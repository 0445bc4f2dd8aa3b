"""The oracle against seven plain loops, known values, and the NumPy baseline."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsched.benchmark.baseline import gemm_baseline
from convsched.errors import ArrayError
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.conv2d import Activation
from convsched.problem.reference import activate, convolve

two = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def tiny(draw: st.DrawFn) -> Conv2d:
    groups = draw(st.integers(1, 3))
    return Conv2d(
        groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), draw(two), draw(two),
        draw(st.tuples(*[st.integers(0, 2)] * 4) | st.just("same")), draw(two), groups, draw(st.booleans()),
        input_size=draw(st.tuples(st.integers(7, 8), st.integers(7, 8))), batch_size=draw(st.integers(1, 2)),
        activation=draw(st.sampled_from([None, "relu", ("clip", -3, 5), ("leaky_relu", 0.5)])),
        residual=draw(st.booleans()),
    )  # fmt: skip


def arrays(problem: Problem, seed: int) -> list[Any]:
    """x, weight, bias, residual of small integers, in float32: every sum is exact."""
    rng = np.random.default_rng(seed)
    shapes = (
        problem.input_shape,
        problem.weight_shape,
        problem.bias_shape if problem.bias else None,
        problem.output_shape if problem.residual else None,
    )
    return [None if s is None else rng.integers(-4, 5, s).astype(np.float32) for s in shapes]


def seven_loops(p: Conv2d, x: Any, weight: Any, bias: Any, residual: Any) -> list[float]:
    """The output in C order, from the definition alone."""
    out = []
    for n, m, e, f in itertools.product(range(p.N), range(p.M), range(p.E), range(p.F)):
        total = 0.0 if bias is None else float(bias[m])
        if residual is not None:
            total += float(residual[n, m, e, f])
        group = m * p.groups // p.M
        for c, r, s in itertools.product(range(p.C // p.groups), range(p.R), range(p.S)):
            row = e * p.stride[0] + r * p.dilation[0] - p.padding[0]
            column = f * p.stride[1] + s * p.dilation[1] - p.padding[1]
            if 0 <= row < p.H and 0 <= column < p.W:
                total += float(x[n, group * (p.C // p.groups) + c, row, column]) * float(weight[m, c, r, s])
        match p.activation:
            case "relu":
                total = max(total, 0.0)
            case ("clip", lo, hi):
                total = min(max(total, lo), hi)
            case ("leaky_relu", alpha):
                total = total if total >= 0 else alpha * total
        out.append(total)
    return out


@given(tiny(), st.integers(0, 99))
def test_oracle_and_baseline_equal_seven_loops(problem: Conv2d, seed: int) -> None:
    given_arrays = arrays(problem, seed)
    expected = np.reshape(seven_loops(problem, *given_arrays), problem.output_shape)
    y, baseline = convolve(problem, *given_arrays), gemm_baseline(problem, *given_arrays)
    assert [y.dtype.name, baseline.dtype.name] == ["float64", "float32"]
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(baseline, expected)


@given(st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 99))
def test_linear_is_a_matrix_product(n: int, m: int, bias: bool, residual: bool, seed: int) -> None:
    problem = Linear(3, m, bias, batch_size=n, residual=residual, activation="relu")
    x, weight, b, r = arrays(problem, seed)
    expected = np.maximum(x @ weight.T + (0 if b is None else b) + (0 if r is None else r), 0)
    np.testing.assert_array_equal(convolve(problem, x, weight, b, r), expected)
    np.testing.assert_array_equal(gemm_baseline(problem, x, weight, b, r), expected)


def test_a_centred_one_is_the_identity() -> None:
    problem = Conv2d(3, 3, 3, padding=1, groups=3, bias=False, input_size=(5, 6))
    x, weight = arrays(problem, 0)[0], np.zeros(problem.weight_shape)
    weight[:, :, 1, 1] = 1
    np.testing.assert_array_equal(convolve(problem, x, weight), x)


def test_it_correlates_rather_than_convolves() -> None:
    problem = Conv2d(1, 1, (1, 3), bias=False, input_size=(1, 3))
    assert convolve(problem, [[[[1, 10, 100]]]], [[[[1, 2, 3]]]]).item() == 321


def test_float32_baseline_is_close_on_real_numbers() -> None:
    problem = Conv2d(16, 24, 3, padding="same", groups=2, input_size=12, activation="silu")
    rng = np.random.default_rng(0)
    x, weight, bias = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in (problem.input_shape, problem.weight_shape, problem.bias_shape)
    )
    y = convolve(problem, x, weight, bias)
    # A sum of 72 products: well under 72 roundings of 2^-24 each, relative to the output's rms.
    assert np.abs(gemm_baseline(problem, x, weight, bias) - y).max() < 4e-6 * np.sqrt(np.mean(y * y))


@pytest.mark.parametrize(
    ("activation", "values", "expected"),
    [
        (None, [-2, 3], [-2, 3]),
        ("relu", [-2, 0, 3], [0, 0, 3]),
        ("relu6", [-1, 3, 7], [0, 3, 6]),
        ("sigmoid", [0, math.log(3), -math.log(3)], [0.5, 0.75, 0.25]),
        ("tanh", [0, math.log(2)], [0, 0.6]),
        ("silu", [0, math.log(3)], [0, 0.75 * math.log(3)]),
        ("hardswish", [-4, -3, -1.5, 0, 3, 5], [0, 0, -0.375, 0, 3, 5]),
        ("hardsigmoid", [-4, -3, 0, 1.5, 3, 4], [0, 0, 0.5, 0.75, 1, 1]),
        (("leaky_relu", 0.25), [-4, 0, 4], [-1, 0, 4]),
        (("elu", 2.0), [-math.log(2), 0, 4], [-1, 0, 4]),
        (("clip", -1.0, 2.0), [-3, 0, 3], [-1, 0, 2]),
    ],
)  # fmt: skip
def test_activation_values(activation: Activation, values: list[float], expected: list[float]) -> None:
    got = activate(activation, values)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [
        ("relu", 0, math.inf), ("relu6", 0, 6), ("sigmoid", 0, 1), ("tanh", -1, 1), ("silu", 0, math.inf),
        ("hardswish", 0, math.inf), ("hardsigmoid", 0, 1), (("leaky_relu", 0.5), -math.inf, math.inf),
        (("elu", 2.0), -2, math.inf), (("clip", -1.0, 2.0), -1, 2),
    ],
)  # fmt: skip
def test_activation_limits_and_nan(activation: Activation, low: float, high: float) -> None:
    got = activate(activation, [-math.inf, math.inf, math.nan, -1e308, 1e308])
    assert got[:2].tolist() == [low, high]
    assert math.isnan(got[2])
    assert np.isfinite(got[3:]).all()


GOOD = Conv2d(2, 3, 3, input_size=4, residual=True)


@pytest.mark.parametrize("function", [convolve, gemm_baseline])
@pytest.mark.parametrize(
    ("position", "array", "message"),
    [
        (0, np.zeros((2, 4, 4)), r"x: has shape \(2, 4, 4\); must be \(1, 2, 4, 4\)"),
        (1, np.zeros((3, 2, 3)), r"weight: has shape \(3, 2, 3\); must be \(3, 2, 3, 3\)"),
        (2, np.zeros(2), r"bias: has shape \(2,\); must be \(3,\)"),
        (2, None, r"bias: missing; this problem takes one of shape \(3,\)"),
        (3, np.zeros((1, 3, 2, 1)), r"residual: has shape \(1, 3, 2, 1\); must be \(1, 3, 2, 2\)"),
        (3, None, "residual: missing"),
    ],
)
def test_wrong_arrays_are_named(function: Any, position: int, array: Any, message: str) -> None:
    given_arrays = arrays(GOOD, 0)
    given_arrays[position] = array
    with pytest.raises(ArrayError, match=message):
        function(GOOD, *given_arrays)


@pytest.mark.parametrize("name", ["bias", "residual"])
def test_an_array_too_many_is_named(name: str) -> None:
    problem = Conv2d(2, 3, 3, input_size=4, bias=False)
    x, weight, _, _ = arrays(problem, 0)
    with pytest.raises(ArrayError, match=f"{name}: this problem has none"):
        convolve(problem, x, weight, **{name: np.zeros(3)})
