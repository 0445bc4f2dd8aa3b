"""Strassen's algorithm as kernels: 1x1 convolutions and fully connected layers, exact on small integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convsched as cs
from convsched.algorithms import named
from convsched.errors import LoweringError
from convsched.interp import interpret
from convsched.kernels.arrays import from_layout, to_layout
from convsched.kernels.kernel import Kernel
from convsched.kernels.source import run_source
from convsched.lower.blocks import blocks_of, lower_strassen
from convsched.machine import Machine
from convsched.problem import Conv2d, Linear, Problem
from convsched.reference import convolve
from convsched.schedule import Schedule, apply, parse_schedule
from convsched.strassen_recipe import StrassenBlocks, default_strassen

QUICK = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
LAYOUTS = ("nchw", "nhwc", "nchw16c")


@st.composite
def products(draw: st.DrawFn, least: int = 2, most: int = 64) -> Problem:
    """A layer that is a product of matrices, each size at least ``least``: even, odd, within a vector or past it."""
    channels = st.sampled_from([n for n in (2, 3, 4, 5, 11, 16, 17, 33, 64) if least <= n <= most])
    options: dict[str, Any] = {"bias": draw(st.booleans()), "residual": draw(st.booleans()),
                               "activation": draw(st.sampled_from([None, "relu"]))}
    if draw(st.booleans()):
        return Linear(draw(channels), draw(channels), batch_size=draw(st.integers(least, most)), **options)
    size = (draw(st.integers(least, 9)), draw(st.integers(1, max(1, most // 8))))
    return Conv2d(draw(channels), draw(channels), 1, input_size=size, batch_size=draw(st.integers(1, 2)), **options)


def layouts_of(problem: Problem) -> tuple[str, ...]:
    return LAYOUTS if isinstance(problem, Conv2d) else LAYOUTS[:1]


def data_of(problem: Problem) -> tuple[dict[str, Any], Any]:
    """Small integers, and the output they give."""
    rng = np.random.default_rng(0)
    x, w, b, z = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (
        problem.input_shape, problem.weight_shape, problem.bias_shape, problem.output_shape))
    data = {"x": x, "w": w} | ({"b": b} if problem.bias else {}) | ({"z": z} if problem.residual else {})
    return data, convolve(problem, x, w, data.get("b"), data.get("z"))


def as_matrices(problem: Problem, array: Any, layout: str) -> Any:
    """Activations with axes n, c and p, as ``lower_strassen`` has them."""
    if isinstance(problem, Linear):
        return array.T[np.newaxis]
    flat = array.reshape(*array.shape[:2], -1)
    return flat.transpose(1, 0, 2).reshape(1, flat.shape[1], -1) if layout == "nhwc" else flat


@QUICK
@given(data=st.data(), levels=st.integers(1, 2))
def test_any_recipe(data: st.DataObject, levels: int) -> None:
    problem = data.draw(products(2**levels, most=11))
    layout = data.draw(st.sampled_from(layouts_of(problem)))
    recipe = StrassenBlocks(
        lanes=data.draw(st.sampled_from([4, 8, 16])), levels=levels, block=data.draw(st.integers(1, 8)),
        vectors=data.draw(st.integers(1, 3)), pixels=data.draw(st.integers(1, 5)),
        unroll=data.draw(st.sampled_from([1, 2, 4])))
    schedule = recipe.schedule(problem, layout)
    assert parse_schedule(schedule.text) == schedule == Schedule.from_json(schedule.to_json())
    program = apply(lower_strassen(problem, levels, layout), schedule)
    given_data, wanted = data_of(problem)
    inputs = {name: as_matrices(problem, array, layout) if name in "xz" else array
              for name, array in given_data.items()}
    expected = as_matrices(problem, wanted, layout)
    np.testing.assert_array_equal(interpret(program, inputs, np.float64)["y"], expected)
    np.testing.assert_array_equal(run_source(program, inputs)["y"], expected)


@settings(QUICK, max_examples=60)
@given(data=st.data(), levels=st.integers(1, 2), threads=st.sampled_from([1, 2]))
def test_kernels_are_exact(data: st.DataObject, levels: int, threads: int) -> None:
    problem = data.draw(products(2**levels))
    layout: Any = data.draw(st.sampled_from(layouts_of(problem)))
    kernel = cs.compile(problem, algorithm=f"strassen({levels})", layout=layout, threads=threads, cache=False)
    given_data, wanted = data_of(problem)
    residual = to_layout(given_data["z"], layout) if problem.residual else None
    out = np.full(kernel.y_shape, np.nan, np.float32)
    kernel(to_layout(given_data["x"], layout), given_data["w"], given_data.get("b"), residual=residual, out=out)
    np.testing.assert_array_equal(from_layout(out, problem.output_shape, layout), wanted)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("problem", [Linear(96, 160, batch_size=1002), Conv2d(96, 160, 1, input_size=(167, 6))])
def test_several_blocks_of_pixels_with_a_ragged_last_one(problem: Problem, levels: int) -> None:
    kernel = cs.compile(problem, algorithm=f"strassen({levels})", threads=1, cache=False)
    assert isinstance(kernel.recipe, StrassenBlocks)
    assert blocks_of(problem, levels).block[2] % kernel.recipe.block
    data, wanted = data_of(problem)
    np.testing.assert_array_equal(kernel(data["x"], data["w"], data["b"]), wanted)


def test_sums_of_weights_are_bound_and_sums_of_pixels_stay_with_their_block() -> None:
    problem = Linear(64, 64, batch_size=512)
    program = apply(lower_strassen(problem), default_strassen(problem, 1, Machine.host()).schedule(problem))
    assert [stage.when for stage in program.stages] == ["bind", "bind", "run"]
    block = default_strassen(problem, 1, Machine.host()).block
    assert block < 256
    for name in "vt":
        *others, pixels = program.tensor(name).shape
        assert others == [7, 1, 32]
        assert block <= pixels < 2 * block  # whole register tiles


@pytest.mark.parametrize(("levels", "least", "most"), [(1, 4, 32), (2, 16, 256)])
def test_only_sums_and_differences_in_the_transforms(levels: int, least: int, most: int) -> None:
    tensors = {t.name: t for t in lower_strassen(Linear(8, 8, batch_size=8), levels).tensors}
    for name in "ABC":
        values = tensors[name].values
        assert set(values) == {-1.0, 0.0, 1.0}
        assert least < sum(map(abs, values)) <= most  # 14^levels


@pytest.mark.parametrize(("name", "problem", "why"), [
    ("strassen", Conv2d(8, 8, 3, input_size=9), "no product of matrices"),
    ("strassen", Conv2d(8, 8, 1, stride=2, input_size=9), "no product of matrices"),
    ("strassen", Conv2d(8, 8, 1, padding=1, input_size=9), "no product of matrices"),
    ("strassen", Conv2d(8, 8, 1, groups=2, input_size=9), "no product of matrices"),
    ("strassen", Linear(8, 8), "1 pixels; each must be at least 2"),
    ("strassen(2)", Linear(8, 3, batch_size=8), "3 output channels.* at least 4"),
    ("strassen(3)", Linear(8, 8, batch_size=8), r"strassen\(1\) or strassen\(2\)"),
    ("strassen(2,2)", Linear(8, 8, batch_size=8), r"strassen\(1\) or strassen\(2\)"),
])
def test_where_it_does_not_apply(name: str, problem: Problem, why: str) -> None:
    with pytest.raises(LoweringError, match=why):
        cs.compile(problem, algorithm=name, cache=False)


def test_it_is_never_chosen_without_measuring() -> None:
    problem = Linear(512, 512, batch_size=512)
    assert cs.compile(problem, threads=1, cache=False).algorithm == "direct"
    assert named("strassen", problem).estimate(Machine.host(), "nchw", 1) == float("inf")


@pytest.mark.parametrize("levels", [1, 2])
def test_predicted_error_is_kept(levels: int) -> None:
    problem = Linear(512, 96, batch_size=96, bias=False)
    rng = np.random.default_rng(1)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in (problem.input_shape, problem.weight_shape))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    algorithm = named(f"strassen({levels})", problem)
    kernel = Kernel(problem, algorithm.default(Machine.host(), "nchw", 1).schedule(problem), layout="nchw", threads=1,
                    machine=Machine.host(), algorithm=algorithm.name)
    error = float(np.abs(kernel(x, w) - exact).max() / np.sqrt((exact**2).mean()))
    assert error < 1.5 * algorithm.prediction.expected
