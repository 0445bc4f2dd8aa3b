"""Products with padding are left out: `skip`, the guards it leaves, and the loop bounds they become."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convsched as cs
from convsched.errors import ScheduleError
from convsched.ir import Program, Reduce, leaves
from convsched.kernels.run.kernel import Kernel
from convsched.lower.direct import lower_direct
from convsched.machine import host
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d
from convsched.problem.problem import meets_input
from convsched.problem.reference import convolve
from convsched.recipes.direct import Channels
from convsched.schedule import Schedule, apply, parse_schedule

LAYER = Conv2d(5, 7, 3, padding=1, bias=False, input_size=(6, 9))


def sums(program: Program) -> int:
    """How many products are added, by counting the points at which the guards hold."""
    total = 0
    for around, leaf in leaves(next(s.body for s in program.stages if s.name == "conv")):
        if isinstance(leaf, Reduce):
            points = np.indices([loop.extent for loop in around]).reshape(len(around), -1)
            names = [loop.var for loop in around]
            holds = np.ones(points.shape[1], bool)
            for guard in leaf.where:
                value = sum((k * points[names.index(v)] for v, k in guard.terms), np.zeros(points.shape[1], int))
                holds &= value + guard.constant < 0
            total += int(holds.sum())
    return total


@st.composite
def padded(draw: st.DrawFn) -> Conv2d:
    """A small convolution with padding of any width, in which some product is with the input."""
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    padding: Any = draw(st.tuples(*[st.integers(0, 4)] * 4).filter(any))
    size = tuple(max(draw(st.integers(1, 20)), k) for k in kernel)
    return Conv2d(draw(st.integers(1, 9)), draw(st.integers(1, 40)), kernel, draw(st.integers(1, 2)), padding,
                  draw(st.integers(1, 2)) if min(size) > 8 else 1, input_size=size,
                  activation=draw(st.sampled_from([None, "relu"])))  # fmt: skip


@settings(max_examples=settings().max_examples // 4)  # each is compiled
@given(problem=padded().filter(meets_input), data=st.data(), layout=st.sampled_from(["nchw", "nhwc"]))
def test_kernels_that_skip_equal_the_oracle(problem: Conv2d, data: st.DataObject, layout: str) -> None:
    small = st.integers(1, 3)
    machine = host.machine()
    recipe = Channels(
        lanes=machine.lanes, vectors=data.draw(small), rows=data.draw(small), pixels=data.draw(st.integers(1, 9)),
        block=data.draw(small), depth=data.draw(st.integers(1, 9)), unroll=data.draw(small),
        pack=data.draw(st.sampled_from(["none", "window"])), skip=data.draw(st.sampled_from(["h", "hw"])))
    kernel = Kernel(Plan.of(named("direct", problem), Target(machine, layout), recipe))
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.integers(-3, 4, shape).astype(np.float32)
                       for shape in (problem.input_shape, problem.weight_shape, problem.bias_shape))
    given_x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if layout == "nhwc" else x
    y = kernel(given_x, weight, bias)
    y = y.transpose(0, 3, 1, 2) if layout == "nhwc" else y
    np.testing.assert_array_equal(y, convolve(problem, x, weight, bias), recipe.schedule(problem, layout).text)


def test_the_products_that_are_left() -> None:
    program = lower_direct(LAYER)
    assert sums(program) == LAYER.macs
    rows, columns = sum((2, 3, 3, 3, 3, 2)), 9 * 3 - 2
    both = apply(program, parse_schedule("skip x h w"))
    assert sums(both) == 5 * 7 * rows * columns
    assert sums(apply(program, parse_schedule("skip x h"))) == 5 * 7 * rows * 9 * 3


def test_peel_guarded_gives_copies_to_guarded_iterations_only() -> None:
    schedule = "skip x w; reorder m e c r f s; peel f guarded; peel s guarded"
    program = apply(lower_direct(LAYER), parse_schedule(schedule))
    loops = [[(loop.var, loop.extent) for loop in around] for around, leaf in leaves(program.stages[1].body)]
    found = [[pair for pair in path if pair[0] in "fs"] for path in loops]
    assert found == [[("s", 2)], [("f", 7), ("s", 3)], [("s", 2)]]
    assert not any(leaf.where for _, leaf in leaves(program.stages[1].body))


def test_a_guard_of_a_run_time_loop_becomes_its_bound() -> None:
    schedule = "skip x h; reorder e m f r c s"
    kernel = cs.compile(LAYER, schedule=schedule, threads=1, cache=False)
    bounds = re.findall(r"call i64 @llvm\.(smin|smax)", kernel.llvm)
    assert sorted(bounds) == ["smax", "smin"]
    conv = kernel.llvm[kernel.llvm.index("@stage_1"):]
    assert "icmp slt i64 0" not in conv  # no test is left inside


def test_padding_times_an_infinite_weight_adds_no_nan() -> None:
    layer = Conv2d(1, 1, 3, padding=1, bias=False, input_size=(4, 4))
    weight = np.zeros((1, 1, 3, 3), np.float32)
    weight[0, 0, 0, 0] = np.inf
    y = cs.compile(layer, schedule="skip x h w", threads=1, cache=False)(np.ones((1, 1, 4, 4), np.float32), weight)
    assert (y[0, 0, 0] == 0).all()
    assert (y[0, 0, :, 0] == 0).all()
    assert np.isposinf(y[0, 0, 1:, 1:]).all()


@pytest.mark.parametrize(("text", "why"), [
    ("skip q h", "there is no tensor q"),
    ("skip x k", "has no axis k"),
    ("skip w r", "has no border"),
    ("skip x c", "has no border"),
    ("stage x at n window n c h w; skip x h", "no sum has products"),
])
def test_what_cannot_be_skipped(text: str, why: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        apply(lower_direct(LAYER), parse_schedule(text))
    assert why in caught.value.why


def test_a_layer_of_padding_alone() -> None:
    layer = Conv2d(1, 1, 1, stride=2, padding=(0, 1, 0, 0), bias=False, input_size=(1, 1))
    with pytest.raises(ScheduleError, match="all products"):
        apply(lower_direct(layer), Schedule(parse_schedule("skip x w").steps))
    assert not meets_input(layer)
