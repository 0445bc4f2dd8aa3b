"""Strassen's algorithm as kernels: dense convolutions and fully connected layers, exact on small integers."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convsched as cs
from convsched.errors import LoweringError
from convsched.ir.interp import interpret
from convsched.kernels.run.kernel import Kernel
from convsched.kernels.source.printer import run_source
from convsched.lower.strassen import blocks_of, lower_strassen
from convsched.machine import host
from convsched.plan.defaults import default_strassen
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.problem import is_flat
from convsched.problem.reference import convolve
from convsched.recipes.strassen import StrassenBlocks
from convsched.schedule import Schedule, apply, parse_schedule

FEW = settings(max_examples=settings().max_examples // 8)  # each is compiled
FEWEST = settings(max_examples=settings().max_examples // 20)  # each is interpreted
LAYOUTS = ("nchw", "nhwc", "nchw16c")
EXACT: dict[Any, float] = {None: 0.0, "relu": 0.0, "hardswish": 1e-6}  # of an activation of exact sums, in float32


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


@st.composite
def convolutions(draw: st.DrawFn, least: int = 2, most: int = 33) -> Problem:
    """A layer with taps, strides, dilation and padding, of at least so many channels and rows of output pixels."""
    channels = st.sampled_from([n for n in (2, 3, 4, 5, 11, 17, 33) if least <= n <= most])
    taps, stride, dilation = (draw(st.tuples(side, side)) for side in (
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    rows, columns = draw(st.integers(least, least + 3)), draw(st.integers(1, 6))
    size = [max(1, (count - 1) * step + (tap - 1) * gap + 1 - before - after + draw(st.integers(0, step - 1)))
            for count, step, tap, gap, before, after
            in zip((rows, columns), stride, taps, dilation, padding[:2], padding[2:], strict=True)]
    return Conv2d(draw(channels), draw(channels), taps, stride, padding, dilation, input_size=tuple(size),
                  bias=draw(st.booleans()), batch_size=draw(st.integers(1, 2)), residual=draw(st.booleans()),
                  activation=draw(st.sampled_from([None, "relu", "hardswish"])))


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
    """Activations as ``lower_strassen`` has them: with axes n, c and one of pixels where they are a row."""
    if isinstance(problem, Conv2d) and not is_flat(problem):
        return array
    if isinstance(problem, Linear):
        return array.T[np.newaxis]
    flat = array.reshape(*array.shape[:2], -1)
    return flat.transpose(1, 0, 2).reshape(1, flat.shape[1], -1) if layout == "nhwc" else flat


@FEWEST
@given(data=st.data(), levels=st.integers(1, 2))
def test_any_recipe(data: st.DataObject, levels: int) -> None:
    problem = data.draw(st.one_of(products(2**levels, most=11), convolutions(2**levels, most=11)))
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
    np.testing.assert_allclose(interpret(program, inputs, np.float64)["y"], expected, rtol=EXACT[problem.activation])
    np.testing.assert_allclose(run_source(program, inputs)["y"], expected, rtol=EXACT[problem.activation])


@FEW
@given(data=st.data(), levels=st.integers(1, 2), threads=st.sampled_from([1, 2]))
def test_kernels_are_exact(data: st.DataObject, levels: int, threads: int) -> None:
    problem = data.draw(st.one_of(products(2**levels), convolutions(2**levels)))
    layout: Any = data.draw(st.sampled_from(layouts_of(problem)))
    kernel = cs.compile(problem, algorithm=f"strassen({levels})", layout=layout, threads=threads, cache=False)
    given_data, wanted = data_of(problem)
    residual = to_layout(given_data["z"], layout) if problem.residual else None
    out = np.full(kernel.y_shape, np.nan, np.float32)
    kernel(to_layout(given_data["x"], layout), given_data["w"], given_data.get("b"), residual=residual, out=out)
    np.testing.assert_allclose(from_layout(out, problem.output_shape, layout), wanted, rtol=EXACT[problem.activation])


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("problem", [Linear(96, 160, batch_size=1002), Conv2d(96, 160, 1, input_size=(167, 6))])
def test_several_blocks_of_pixels_with_a_ragged_last_one(problem: Problem, levels: int) -> None:
    kernel = cs.compile(problem, algorithm=f"strassen({levels})", threads=1, cache=False)
    assert isinstance(kernel.recipe, StrassenBlocks)
    assert blocks_of(problem, levels).block[2] % kernel.recipe.block
    data, wanted = data_of(problem)
    np.testing.assert_array_equal(kernel(data["x"], data["w"], data["b"]), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("levels", [1, 2])
def test_several_blocks_of_rows_with_taps_strides_and_a_ragged_last_one(levels: int, layout: Any) -> None:
    problem = Conv2d(20, 36, 3, stride=(2, 1), padding=(0, 1, 2, 3), input_size=(57, 18), batch_size=2, residual=True,
                     activation="relu")
    recipe = replace(default_strassen(problem, levels, host.machine(), layout), block=5 - levels)
    assert blocks_of(problem, levels).block[2] % recipe.block
    kernel = Kernel(Plan.of(named(f"strassen({levels})", problem), Target(host.machine(), layout, threads=2), recipe))
    data, wanted = data_of(problem)
    x, z = (to_layout(data[name], layout) for name in "xz")
    found = kernel(x, data["w"], data["b"], residual=z)
    np.testing.assert_array_equal(from_layout(found, problem.output_shape, layout), wanted)


def test_sums_of_weights_are_bound_and_sums_of_pixels_stay_with_their_block() -> None:
    problem = Linear(64, 64, batch_size=512)
    program = apply(lower_strassen(problem), default_strassen(problem, 1, host.machine()).schedule(problem))
    assert [stage.when for stage in program.stages] == ["bind", "bind", "run"]
    block = default_strassen(problem, 1, host.machine()).block
    assert block < 256
    for name in "vt":
        *others, pixels = program.tensor(name).shape
        assert others == [7, 1, 32]
        assert block <= pixels < 2 * block  # whole register tiles


def test_a_block_has_its_rows_once_for_each_tap_and_its_columns_once() -> None:
    problem = Conv2d(64, 64, 3, stride=2, padding=1, input_size=56)
    recipe = replace(default_strassen(problem, 1, host.machine()), block=2)
    program = apply(lower_strassen(problem), recipe.schedule(problem))
    *others, columns = program.tensor("v").shape
    assert others == [7, 1, 32, 3, 2]  # products, image, channels, taps r, rows
    assert 57 <= columns < 57 + recipe.lanes  # whole vectors
    strided = Conv2d(64, 64, 1, stride=2, input_size=56)
    assert lower_strassen(strided).tensor("v").shape == (7, 1, 32, 14, 28)  # columns that no tap meets are left out


@pytest.mark.parametrize("levels", [1, 2])
def test_sums_take_the_additions_of_the_shared_ones(levels: int) -> None:
    program = lower_strassen(Conv2d(8, 8, 3, padding=1, input_size=8), levels)
    constants = {t.name: t for t in program.tensors if t.role == "constant"}
    for matrix, additions in (("B", 4), ("C", 7)):
        factors = [t for name, t in constants.items() if name[0] == matrix]
        rows = [len(t.values) // prod(t.shape[1 + (t.letters[0] == "i"):]) for t in factors]
        assert sum(map(abs, chain(*(t.values for t in factors)))) - sum(rows) == additions


@pytest.mark.parametrize("levels", [1, 2])
def test_only_sums_and_differences_in_the_transforms(levels: int) -> None:
    constants = [t for t in lower_strassen(Linear(8, 8, batch_size=8), levels).tensors if t.role == "constant"]
    assert [t.name for t in constants] == ["A", "B1", "B2", "B3", "C1", "C2", "C3"]
    for tensor in constants:
        assert set(tensor.values) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(("name", "problem", "why"), [
    ("strassen", Conv2d(8, 8, 1, groups=2, input_size=9), "has 2 groups.* use direct"),
    ("strassen(2)", Conv2d(8, 8, 3, groups=8, input_size=9), "has 8 groups.* use direct"),
    ("strassen", Conv2d(1, 8, 3, input_size=9), r"cut in 2 .*input channels \(1\).* at least 2; use direct"),
    ("strassen(2)", Conv2d(8, 8, 3, input_size=(5, 9)), r"cut in 4 .*rows of output pixels \(3\).* at least 4"),
    ("strassen", Linear(8, 8), r"output pixels \(1\).* at least 2"),
    ("strassen(2)", Linear(8, 3, batch_size=8), r"output channels \(3\).* at least 4"),
    ("strassen(3)", Linear(8, 8, batch_size=8), r"strassen\(1\) or strassen\(2\)"),
    ("strassen(2,2)", Linear(8, 8, batch_size=8), r"strassen\(1\) or strassen\(2\)"),
])
def test_where_it_does_not_apply(name: str, problem: Problem, why: str) -> None:
    with pytest.raises(LoweringError, match=why):
        cs.compile(problem, algorithm=name, cache=False)


@pytest.mark.parametrize("levels", [0, 3])
def test_one_level_or_two(levels: int) -> None:
    with pytest.raises(LoweringError, match="use one or two"):
        lower_strassen(Linear(64, 64, batch_size=64), levels)


def test_it_is_never_chosen_without_measuring() -> None:
    assert cs.compile(Conv2d(512, 512, 3, stride=2, input_size=29), threads=1, cache=False).algorithm == "direct"
    problem = Linear(512, 512, batch_size=512)
    assert cs.compile(problem, threads=1, cache=False).algorithm == "direct"
    assert named("strassen", problem).estimate(host.machine(), "nchw", 1) == float("inf")


@pytest.mark.parametrize("problem", [Linear(512, 96, batch_size=96, bias=False),
                                     Conv2d(64, 96, 3, padding=1, input_size=16, bias=False)], ids=str)
@pytest.mark.parametrize("levels", [1, 2])
def test_predicted_error_is_kept(levels: int, problem: Problem) -> None:
    rng = np.random.default_rng(1)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in (problem.input_shape, problem.weight_shape))
    exact = convolve(problem, x, w)
    algorithm = named(f"strassen({levels})", problem)
    assert algorithm.terms == 2**-levels * problem.C * problem.R * problem.S
    kernel = Kernel(Plan.of(algorithm, Target(host.machine())))
    error = float(np.abs(kernel(x, w) - exact).max() / np.sqrt((exact**2).mean()))
    assert error < 1.5 * algorithm.prediction.expected
