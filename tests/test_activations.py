"""Activations at the ends of the float range: every backend gives the limits, and NaN for NaN.

Infinities and NaN must be where the float64 oracle has them once it is rounded to float32; elsewhere the error is at
most a few units in the last place of the truth, or of 1 where that is greater.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import convsched as cs
from convsched.ir import Affine, Load, Loop, Program, Stage, Store, Tensor, storage_of
from convsched.ir.interp import interpret
from convsched.kernels.source.printer import run_source
from convsched.lower.epilogue import activation
from convsched.problem import Conv2d
from convsched.problem.layout import LAYOUTS, from_layout, to_layout
from convsched.problem.reference import activate, activate_as_is
from convsched.problem.rules import ACTIVATIONS, Activation

LIMITS: list[tuple[Activation, float, float]] = [
    (None, -np.inf, np.inf), ("relu", 0, np.inf), ("relu6", 0, 6), ("sigmoid", 0, 1), ("tanh", -1, 1),
    ("silu", 0, np.inf), ("hardsigmoid", 0, 1), ("hardswish", 0, np.inf), (("leaky_relu", 0.25), -np.inf, np.inf),
    (("leaky_relu", 0.0), 0, np.inf), (("leaky_relu", -0.5), np.inf, np.inf), (("leaky_relu", 3.0), -np.inf, np.inf),
    (("elu", 1.5), -1.5, np.inf), (("elu", 0.0), 0, np.inf),
    (("clip", -1.0, 2.0), -1, 2), (("clip", -np.inf, 2.0), -np.inf, 2), (("clip", 0.0, np.inf), 0, np.inf),
]
"""Activations with their limits at minus and plus infinity."""

KINDS = [kind for kind, _, _ in LIMITS]
_FLOAT32 = np.finfo(np.float32)
_SIZES: list[float] = [
    0.0, 1e-45, 1e-40, float(_FLOAT32.tiny), 1e-30, 1e-7, 0.5, 2.9999998, 3.0, 3.0000002, 17.0, 86.9, 87.2, 87.4, 87.7,
    88.1, 88.4, 88.7, 88.8, 89.5, 103.0, 105.0, 710.0, 1e4, 1e30, 1e33, 1e37, 3e38, float(_FLOAT32.max), np.inf,
]
VALUES = np.array([*_SIZES, *(-size for size in _SIZES), np.nan], np.float32)


BACKENDS: dict[str, Callable[[Program], Mapping[str, NDArray[Any]]]] = {
    "numba": lambda program: run_source(program, {"x": VALUES}, jit=True),
    "source": lambda program: run_source(program, {"x": VALUES}),
    "interpreter": lambda program: interpret(program, {"x": VALUES}),
    "interpreter in float64": lambda program: interpret(program, {"x": VALUES}, np.float64),
}


def pointwise() -> Program:
    """All activations of x, each as an output of its own."""
    shape, index = VALUES.shape, (Affine.of("i"),)
    tensors = [Tensor("x", ("i",), shape, "input", storage_of(("i",), shape))]
    tensors += [replace(tensors[0], name=f"y{k}", role="output") for k in range(len(KINDS))]
    body = tuple(Store(f"y{k}", index, activation(kind, Load("x", index))) for k, kind in enumerate(KINDS))
    return Program("pointwise", tuple(tensors), (Stage("s", (Loop("i", shape[0], body),)),))


def check(kind: Activation, found: NDArray[Any]) -> None:
    """The values found, against those of the oracle."""
    with np.errstate(over="ignore", under="ignore"):
        expected = activate(kind, VALUES).astype(np.float32)
        found = found.astype(np.float32)
    for y, truth, x in zip(found.tolist(), expected.tolist(), VALUES.tolist(), strict=True):
        right = y == truth or abs(y - truth) <= 5e-7 * max(1.0, abs(truth)) or (np.isnan(y) and np.isnan(truth))
        assert right, f"{kind} of {x}: {y}, not {truth}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_the_limits_of_the_oracle(backend: str) -> None:
    found = BACKENDS[backend](pointwise())
    for k, kind in enumerate(KINDS):
        check(kind, found[f"y{k}"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kernels_have_the_limits_of_the_oracle(kind: Activation, layout: Any) -> None:
    """Vectors of channels and a remainder; all of them are the same sum."""
    problem = Conv2d(1, 17, 1, bias=False, input_size=(1, VALUES.size), activation=kind)
    kernel = cs.compile(problem, threads=1, cache=False, layout=layout)
    y = kernel.bind(np.ones(problem.weight_shape, np.float32))(to_layout(VALUES.reshape(problem.input_shape), layout))
    for channel in from_layout(y, problem.output_shape, layout)[0, :, 0]:
        check(kind, channel)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_oracle_in_float32_has_its_limits(kind: Activation) -> None:
    with np.errstate(over="ignore"):
        check(kind, activate_as_is(kind, VALUES))


@pytest.mark.parametrize(("kind", "low", "high"), LIMITS, ids=str)
def test_the_oracle_has_the_limits(kind: Activation, low: float, high: float) -> None:
    np.testing.assert_array_equal(activate(kind, [-np.inf, np.inf, np.nan]), [low, high, np.nan])


def test_every_activation_is_tried() -> None:
    assert {kind if isinstance(kind, str) else kind[0] for kind in KINDS if kind is not None} == set(ACTIVATIONS)
