"""Every algorithm computes the same convolution: any sizes, any recipe parameters, all backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import convsched as cs
from convsched.errors import LoweringError, ScheduleError
from convsched.ir import Program
from convsched.ir.interp import interpret
from convsched.kernels.run.kernel import Kernel
from convsched.kernels.source.printer import run_source
from convsched.lower.plane import Plane
from convsched.machine import host
from convsched.plan.defaults import default_recipe
from convsched.plan.families import FAMILIES, Algorithm, applicable, named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.problem import is_flat
from convsched.problem.reference import convolve
from convsched.recipes.im2col import Toeplitz
from convsched.recipes.tiles import Tiles
from convsched.schedule import Schedule, apply, parse_schedule

FEW = settings(max_examples=settings().max_examples // 8)  # each is interpreted, or compiled
FEWEST = settings(max_examples=settings().max_examples // 20)
LAYOUTS = ("nchw", "nhwc", "nchw16c")
NAMES = ("winograd(2,3)", "winograd(4,3)", "winograd(3,3)", "winograd(2,5)", "winograd(4,5)", "winograd(2,7)",
         "winograd(6,3)", "winograd(2,3)x(4,5)")
EXACT = 1e-9  # float64 rounding, of transforms with fractions
FLOAT32 = 2e-4  # of max |error| / rms; the accuracy of each algorithm is tested where it is predicted


@st.composite
def dense(draw: st.DrawFn, taps: tuple[int, int] | None = None, stride: int = 1) -> Conv2d:
    """A small convolution without groups, of ``taps`` if given."""
    r, s = taps or (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    size = (draw(st.integers(r, 13)), draw(st.integers(s, 21)))
    channels = st.sampled_from([1, 3, 4, 7, 8, 16, 17, 20, 33])
    return Conv2d(draw(channels), draw(channels), (r, s), stride, draw(st.tuples(*[st.integers(0, 2)] * 4)),
                  bias=draw(st.booleans()), input_size=size, batch_size=draw(st.sampled_from([1, 1, 2])),
                  activation=draw(st.sampled_from([None, "relu"])), residual=draw(st.booleans()))  # fmt: skip


def data_of(program: Program) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {t.name: rng.integers(-3, 4, t.shape).astype(np.float32)
            for t in program.tensors if t.role in ("input", "weight")}


def expected(problem: Conv2d, data: dict[str, Any]) -> Any:
    residual = data["z"].reshape(problem.output_shape) if "z" in data else None
    return convolve(problem, data["x"], data["w"], data.get("b"), residual)


def check(problem: Conv2d, algorithm: Algorithm, recipe: Tiles | Toeplitz, layout: str) -> None:
    """The scheduled nest in float64, and as source in float32."""
    schedule = recipe.schedule(problem, layout)
    assert parse_schedule(schedule.text) == schedule == Schedule.from_json(schedule.to_json())
    program = apply(algorithm.lower(layout), schedule)
    data = data_of(program)
    wanted = expected(problem, data)
    scale = max(1.0, float(np.abs(wanted).max()))
    exact = interpret(program, data, np.float64)["y"].reshape(wanted.shape)
    np.testing.assert_allclose(exact, wanted, rtol=0, atol=EXACT * scale)
    single = run_source(program, data)["y"].reshape(wanted.shape)
    np.testing.assert_allclose(single, wanted, rtol=0, atol=FLOAT32 * scale)


def taps_of(name: str) -> list[int]:
    return [int(pair.split(",")[1][0]) for pair in name.split("(")[1:]]


@pytest.mark.parametrize("name", NAMES)
@FEWEST
@given(data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_winograd_with_any_recipe(name: str, layout: str, data: st.DataObject) -> None:
    taps = taps_of(name)
    sides = data.draw(st.sampled_from([(taps[0], taps[-1]), *([(1, taps[0]), (taps[0], 1)] * (len(taps) == 1))]))
    problem = data.draw(dense(sides))
    algorithm = named(name, problem)
    default = algorithm.default(host.machine(), layout, 1)
    assert isinstance(default, Tiles)
    rows = Plane(problem, default.shape.outputs).tiles[0]
    check(problem, algorithm, Tiles(
        lanes=data.draw(st.sampled_from([4, 8, 16])), shape=default.shape,
        block=data.draw(st.sampled_from([b for b in range(1, rows + 1) if rows % b == 0])),
        vectors=data.draw(st.integers(1, 3)), pixels=data.draw(st.integers(1, 9)),
        unroll=data.draw(st.sampled_from([1, 2, 4])), by_lines=data.draw(st.booleans())), layout)


@st.composite
def split_layers(draw: st.DrawFn) -> Conv2d:
    """A small layer with groups and, along each side, a stride or a dilation or neither."""
    sides = [draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)])) for _ in range(2)]
    r, s = draw(st.sampled_from([(3, 3), (1, 3), (5, 1), (2, 4)]))
    groups = draw(st.sampled_from([1, 2, 3]))
    channels = st.sampled_from([1, 3, 8, 9])
    size = (draw(st.integers(13, 19)), draw(st.integers(13, 25)))
    return Conv2d(draw(channels) * groups, draw(channels) * groups, (r, s), tuple(one[0] for one in sides),
                  draw(st.tuples(*[st.integers(0, 2)] * 4)), tuple(one[1] for one in sides), groups,
                  bias=draw(st.booleans()), input_size=size, batch_size=draw(st.sampled_from([1, 2])),
                  activation=draw(st.sampled_from([None, "relu"])), residual=draw(st.booleans()))


@FEWEST
@given(problem=split_layers(), layout=st.sampled_from(LAYOUTS), by_lines=st.booleans())
def test_winograd_of_strides_dilations_and_groups(problem: Conv2d, layout: Any, by_lines: bool) -> None:
    algorithm = named("winograd", problem)
    default = algorithm.default(host.machine(), layout, 1)
    assert isinstance(default, Tiles)
    check(problem, algorithm, replace(default, by_lines=by_lines), layout)


@pytest.mark.parametrize("problem", [
    Conv2d(16, 24, 3, 2, padding=1, input_size=(15, 18), groups=2),
    Conv2d(16, 16, 3, padding=2, dilation=2, input_size=(15, 18)),
    Conv2d(16, 16, (3, 1), (1, 2), dilation=(3, 1), input_size=(17, 18)),
    Conv2d(8, 8, (1, 11), padding=(0, 5), input_size=(3, 30)),
], ids=["stride and groups", "dilation", "both sides", "eleven taps"])
def test_kernels_of_split_layers(problem: Conv2d) -> None:
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in (
        problem.input_shape, problem.weight_shape, problem.bias_shape))
    conv = cs.compile(problem, algorithm="winograd", threads=2, cache=False).bind(w, b)
    assert conv.measured_error(x) < conv.kernel.predicted_error.worst
    np.testing.assert_allclose(conv(x), convolve(problem, x, w, b), rtol=0, atol=1e-4)


@FEW
@given(data=st.data(), layout=st.sampled_from(LAYOUTS), stride=st.integers(1, 2), groups=st.sampled_from([1, 1, 2]))
def test_im2col_with_any_recipe(data: st.DataObject, layout: str, stride: int, groups: int) -> None:
    one = data.draw(dense(stride=stride).filter(lambda p: not is_flat(p)))
    problem = Conv2d(one.C * groups, one.M * groups, (one.R, one.S), stride, one.padding, groups=groups, bias=one.bias,
                     input_size=(one.H, one.W), activation=one.activation, residual=one.residual)
    check(problem, named("im2col", problem), Toeplitz(
        lanes=data.draw(st.sampled_from([4, 8, 16])), vectors=data.draw(st.integers(1, 3)),
        pixels=data.draw(st.integers(1, 9)), unroll=data.draw(st.sampled_from([1, 2, 4])),
        block=data.draw(st.sampled_from([b for b in range(1, problem.E + 1) if problem.E % b == 0])),
        parallel=data.draw(st.sampled_from(["pixels", "channels"])), indirect=data.draw(st.booleans()),
        prefetch=data.draw(st.sampled_from([0, 4]))), layout)


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", [
    Conv2d(16, 20, 3, 2, padding=1, input_size=(14, 15), groups=2, activation="relu"),
    Conv2d(9, 20, 3, input_size=(10, 11), batch_size=2), Conv2d(8, 16, 1, 2, input_size=(14, 14)),
], ids=["padding", "no padding", "1x1"])
def test_kernels_of_both_forms_of_im2col(problem: Conv2d, layout: Any, indirect: bool) -> None:
    """The matrix stored or not: exact, on two threads, from the same program."""
    schedule = Toeplitz(8, 2, 6, problem.E, 4, indirect=indirect).schedule(problem, layout)
    kernel = cs.compile(problem, algorithm="im2col", schedule=schedule, layout=layout, threads=2, cache=False)
    assert ("i" in kernel.plan.program.by_name) is not indirect
    rng = np.random.default_rng(0)
    x, w, b = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (
        problem.input_shape, problem.weight_shape, problem.bias_shape))
    y = from_layout(kernel(to_layout(x, layout), w, b), problem.output_shape, layout)
    np.testing.assert_array_equal(y, convolve(problem, x, w, b))


@FEW
@given(problem=dense((3, 3)) | dense((1, 5)) | dense((3, 1)) | dense((1, 1)), layout=st.sampled_from(LAYOUTS),
       threads=st.sampled_from([1, 2]), family=st.sampled_from(sorted(FAMILIES)))
def test_kernels_of_each_family(problem: Conv2d, layout: Any, threads: int, family: str) -> None:
    assume(family in {one.name.split("(")[0] for one in applicable(problem)})
    kernel = cs.compile(problem, algorithm=family, layout=layout, threads=threads, cache=False)
    assert kernel.algorithm.startswith(family)
    rng = np.random.default_rng(0)
    x, w, b, z = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (
        problem.input_shape, problem.weight_shape, problem.bias_shape, problem.output_shape))
    bias, residual = b if problem.bias else None, z if problem.residual else None
    out = np.full(kernel.y_shape, np.nan, np.float32)
    given_z = None if residual is None else to_layout(residual, layout)
    kernel(to_layout(x, layout), w, bias, residual=given_z, out=out)
    wanted = convolve(problem, x, w, bias, residual)
    scale = max(1.0, float(np.abs(wanted).max()))
    tolerance = 0 if family in ("direct", "im2col") else FLOAT32 * scale
    np.testing.assert_allclose(from_layout(out, problem.output_shape, layout), wanted, rtol=0, atol=tolerance)


def test_winograd_two_three_is_exact_on_small_integers() -> None:
    problem = Conv2d(8, 8, 3, padding=1, input_size=(9, 9), bias=False)
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (problem.input_shape, problem.weight_shape))
    y = cs.compile(problem, algorithm="winograd(2,3)", threads=1, cache=False)(x, 4 * w)
    np.testing.assert_array_equal(y, convolve(problem, x, 4 * w))


@pytest.mark.parametrize(("name", "problem", "why"), [
    ("winograd", Conv2d(4, 4, 3, stride=2, dilation=2, input_size=9), "a stride and a dilation"),
    ("winograd", Conv2d(4, 4, 17, input_size=29), "has 17 taps along a side, more than 16; use fft"),
    ("winograd", Conv2d(4, 4, 1, input_size=9), "one tap"),
    ("winograd", Linear(4, 4), "fully connected"),
    ("winograd(4,5)", Conv2d(4, 4, 3, input_size=9), "taps"),
    ("winograd(1,3)", Conv2d(4, 4, 3, input_size=9), "at least 2"),
    ("im2col", Conv2d(4, 4, 1, input_size=9), "as it stands"),
    ("im2col(2,3)", Conv2d(4, 4, 3, input_size=9), "no sizes"),
    ("nested(2,3)", Conv2d(4, 4, 3, input_size=9), "use one of direct, winograd, fft, im2col, strassen"),
    ("winograd(4)", Conv2d(4, 4, 3, input_size=9), r"winograd\(4\): .* write \(m,r\)"),
    ("", Linear(4, 4), "use one of direct"),
    ("wino", Linear(4, 4), "use one of direct"),
    ("direct(2,3)", Linear(4, 4), "no sizes"),
])
def test_where_an_algorithm_does_not_apply(name: str, problem: Any, why: str) -> None:
    with pytest.raises(LoweringError, match=why):
        cs.compile(problem, algorithm=name)


def test_the_usual_members_of_the_families() -> None:
    def usual(problem: Problem) -> dict[str, str]:
        return {one.name.split("(")[0]: one.name for one in applicable(problem)}

    assert usual(Conv2d(8, 8, 3, input_size=9)).items() >= {"direct": "direct", "im2col": "im2col",
                                                            "winograd": "winograd(4,3)"}.items()
    assert usual(Conv2d(8, 8, (1, 7), input_size=9))["winograd"] == "winograd(2,7)"
    assert usual(Linear(8, 8)).keys() & {"direct", "im2col", "winograd", "fft"} == {"direct"}


def test_kernels_of_different_algorithms_do_not_share_code() -> None:
    problem = Conv2d(8, 8, 3, input_size=9)
    schedule = default_recipe(problem, host.machine()).schedule(problem)
    kernel = Kernel(Plan(problem, Target(host.machine()), named("direct", problem), schedule))
    assert kernel.algorithm == "direct"
    with pytest.raises(ScheduleError):
        Kernel(Plan(problem, Target(host.machine()), named("winograd(2,3)", problem), schedule))
