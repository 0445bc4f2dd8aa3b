"""The oracle: a convolution in float64, by definition.

    y[n, g M' + m, e, f] = act(bias + residual
        + sum over r, s of  sum over c of  w[g M' + m, c, r, s] * xpad[n, g C' + c, e sh + r dh, f sw + s dw])

with C' = C/groups and M' = M/groups channels in a group. The loops over r and s are written out; the sum
over c is a matrix product for each image and group. The order of the sums is of no account at the
accuracy float32 kernels are held to: float64 rounds 2^29 times finer.

The activations are those of the papers: ReLU6 and hard swish of MobileNetV2 and V3 (Sandler et al. 2018,
Howard et al. 2019), SiLU of Elfwing et al. (2018), ELU of Clevert et al. (2015); hard sigmoid has the
slope 1/6 of PyTorch (ONNX's default is 1/5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convsched.errors import ArrayError
from convsched.problem.linear import Linear
from convsched.problem.problem import Problem
from convsched.problem.rules import Activation

Floats: TypeAlias = NDArray[np.floating[Any]]


def convolve(
    problem: Problem,
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """The output of a problem, of its `output_shape`, in float64.

    x has `input_shape`, weight `weight_shape`, bias `bias_shape` and residual `output_shape`; bias and
    residual are given exactly if the problem has them. Raises ArrayError otherwise.
    """
    check_shapes(problem, x, weight, bias, residual)
    layer = problem.as_conv2d if isinstance(problem, Linear) else problem
    N, C, H, W, M, R, S, E, F = (
        layer.N, layer.C, layer.H, layer.W, layer.M, layer.R, layer.S, layer.E, layer.F
    )  # fmt: skip
    groups = layer.groups
    (sh, sw), (dh, dw), (top, left, bottom, right) = layer.stride, layer.dilation, layer.padding

    values = np.asarray(x, np.float64).reshape(N, groups, C // groups, H, W)
    padded = np.pad(values, ((0, 0), (0, 0), (0, 0), (top, bottom), (left, right)))
    filters = np.asarray(weight, np.float64).reshape(groups, M // groups, C // groups, R, S)
    y: NDArray[np.float64] = np.zeros((N, groups, M // groups, E * F))
    for r in range(R):
        for s in range(S):
            rows = slice(r * dh, r * dh + (E - 1) * sh + 1, sh)
            columns = slice(s * dw, s * dw + (F - 1) * sw + 1, sw)
            taps = padded[..., rows, columns].reshape(N, groups, C // groups, E * F)
            y += filters[..., r, s] @ taps

    y = y.reshape(N, M, E * F)
    if bias is not None:
        y += np.asarray(bias, np.float64)[:, np.newaxis]
    y = y.reshape(problem.output_shape)
    if residual is not None:
        y += np.asarray(residual, np.float64)
    return activate(problem.activation, y)


def activate(activation: Activation, values: ArrayLike) -> NDArray[np.float64]:
    """An activation of every element, in float64; NaN stays NaN, infinities give the limits.

    >>> activate("hardswish", [-4.0, -1.0, 1.0, 4.0]).round(3).tolist()
    [-0.0, -0.333, 0.667, 4.0]
    """
    return activate_as_is(activation, np.asarray(values, np.float64)).astype(np.float64, copy=False)


def activate_as_is(activation: Activation, values: Floats) -> Floats:
    """An activation of every element, in the precision of the values."""
    if activation is None:
        return values
    name, *parameters = (activation,) if isinstance(activation, str) else activation
    return _FUNCTIONS[str(name)](values, *parameters)


def not_finite(values: Floats) -> str:
    """How many elements are not finite, such as "2 of 9 (1 NaN)"; empty where all are."""
    finite = np.isfinite(values)
    if finite.all():
        return ""
    return f"{values.size - np.count_nonzero(finite)} of {values.size} ({np.count_nonzero(np.isnan(values))} NaN)"


def check_shapes(
    problem: Problem,
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    residual: ArrayLike | None,
) -> None:
    """Raise ArrayError unless the arrays are those the problem takes."""
    expected: dict[str, tuple[ArrayLike | None, tuple[int, ...] | None]] = {
        "x": (x, problem.input_shape),
        "weight": (weight, problem.weight_shape),
        "bias": (bias, problem.bias_shape if problem.bias else None),
        "residual": (residual, problem.output_shape if problem.residual else None),
    }
    for name, (array, shape) in expected.items():
        if shape is None and array is not None:
            raise ArrayError(f"{name}: this problem has none ({problem}); leave it out")
        if shape is not None and array is None:
            raise ArrayError(f"{name}: missing; this problem takes one of shape {shape} ({problem})")
        if shape is not None and array is not None and np.shape(array) != shape:
            raise ArrayError(f"{name}: has shape {np.shape(array)}; must be {shape} ({problem})")


def _sigmoid(v: Floats) -> Floats:
    small = np.exp(-np.abs(v))  # at most 1: exp never overflows
    sigmoid: Floats = np.where(v < 0, small, 1) / (1 + small)
    return sigmoid


def _silu(v: Floats) -> Floats:
    # exp(-1000) is 0 in float64: the bound only turns the limit at -inf from 0 * inf into 0.
    v = np.maximum(v, -1000)
    return v * _sigmoid(v)


def _hardswish(v: Floats) -> Floats:
    v = np.maximum(v, -3)  # 0 from -3 down, at -inf too
    return v * (np.clip(v + 3, 0, 6) / 6)  # divided first: 1e308 * 6 overflows


_FUNCTIONS: dict[str, Callable[..., Floats]] = {
    "relu": lambda v: np.maximum(v, 0),
    "relu6": lambda v: np.clip(v, 0, 6),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": _silu,
    "hardswish": _hardswish,
    "hardsigmoid": lambda v: np.clip(v / 6 + 0.5, 0, 1),
    "leaky_relu": lambda v, alpha: np.where(v < 0, alpha * np.minimum(v, 0), v) if alpha else np.maximum(v, 0),
    "elu": lambda v, alpha: np.where(v < 0, alpha * np.expm1(np.minimum(v, 0)), v),
    "clip": lambda v, lo, hi: np.clip(v, lo, hi),
}
