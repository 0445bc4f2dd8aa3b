"""Bias, residual and activation, which all lowerings leave to ``Epilogue``."""

from __future__ import annotations

import numpy as np
import pytest

from convsched.ir.interp import interpret
from convsched.plan.families import FAMILIES, named
from convsched.problem import Conv2d
from convsched.problem.layout import LAYOUTS
from convsched.problem.reference import convolve

LAYER = Conv2d(4, 4, 3, padding=1, input_size=6, activation="relu6", residual=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_lowering_has_the_whole_epilogue_and_the_same_arguments(family: str) -> None:
    program = named(family, LAYER).lower("nchw")
    arguments = [t.name for t in program.tensors if t.role in ("input", "weight", "output")]
    assert sorted(arguments[:2]) == ["w", "x"]
    assert arguments[2:] == ["y", "b", "z"]
    random = np.random.default_rng(0)
    x, w, b, z = (random.standard_normal(shape) for shape in (
        LAYER.input_shape, LAYER.weight_shape, LAYER.bias_shape, LAYER.output_shape))
    shape = program.tensor("z").shape
    found = interpret(program, {"x": x, "w": w, "b": b, "z": z.reshape(shape)}, np.float64)["y"]
    np.testing.assert_allclose(found.reshape(LAYER.output_shape), convolve(LAYER, x, w, b, z), atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_residual_lies_in_memory_as_the_output_does(family: str, layout: str) -> None:
    program = named(family, LAYER).lower(layout)
    assert program.tensor("z").storage == program.tensor("y").storage
