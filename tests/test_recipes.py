"""Every recipe fits every problem it is for, in every layout, and computes what the unscheduled nest does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convsched.ir import Program
from convsched.ir.interp import interpret
from convsched.ir.text import print_nest
from convsched.lower.direct import LAYOUTS, lower_direct
from convsched.machine import Isa, Machine
from convsched.plan.defaults import default_recipe
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.problem import is_flat, meets_input
from convsched.recipes.direct import Channels, Depthwise, Pixels, copy_stride
from convsched.recipes.recipe import Recipe
from convsched.schedule import Schedule, apply, parse_schedule

FEW = settings(max_examples=settings().max_examples // 4)  # each is interpreted twice
ISAS: tuple[Isa, ...] = ("avx512", "avx2", "sse", "neon")


@st.composite
def convolutions(draw: st.DrawFn, depthwise: bool = False) -> Conv2d:
    """A small convolution; channel counts around the widths of vectors."""
    groups = draw(st.sampled_from([1, 1, 2, 3]) if not depthwise else st.sampled_from([2, 5, 16, 19, 33]))
    channels, maps = (1, 1) if depthwise else (draw(st.integers(1, 9)), draw(st.sampled_from(
        [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 33, 40])))
    flat = draw(st.integers(0, 3)) == 0
    kernel = (1, 1) if flat else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    stride = (1, 1) if flat else (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (0,) * 4 if flat else draw(st.tuples(*[st.integers(0, 2)] * 4))
    size = tuple(max(draw(st.integers(1, 12)), d * (k - 1) + 1)
                 for k, d in zip(kernel, dilation, strict=True))
    return Conv2d(groups * channels, groups * maps, kernel, stride, padding, dilation, groups,
                  draw(st.booleans()), input_size=size, batch_size=draw(st.integers(1, 2)),
                  activation=draw(st.sampled_from([None, "relu"])), residual=draw(st.booleans()))


@st.composite
def products(draw: st.DrawFn) -> Linear:
    return Linear(draw(st.integers(1, 40)), draw(st.integers(1, 40)), bias=draw(st.booleans()),
                  batch_size=draw(st.integers(1, 20)), activation=draw(st.sampled_from([None, "relu"])))


def output(program: Program) -> np.ndarray[Any, Any]:
    """The output for small integers that depend on the number of elements only."""
    arrays = {}
    for t in program.tensors:
        if t.role in ("input", "weight"):
            rng = np.random.default_rng(len(t.name) + int(np.prod(t.shape)))
            arrays[t.name] = rng.integers(-3, 4, t.shape).astype(np.float32)
    return interpret(program, arrays)["y"].reshape(-1)


def check(problem: Problem, recipe: Recipe, layout: str) -> None:
    schedule = recipe.schedule(problem, layout)
    assert parse_schedule(schedule.text) == schedule == Schedule.from_json(schedule.to_json())
    program = lower_direct(problem, layout)
    np.testing.assert_array_equal(output(apply(program, schedule)), output(program))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("isa", ISAS)
@FEW
@given(problem=convolutions() | convolutions(depthwise=True) | products(), threads=st.integers(1, 3))
def test_default_recipe(layout: str, isa: Isa, problem: Problem, threads: int) -> None:
    check(problem, default_recipe(problem, Machine.example(isa), layout, threads), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@FEW
@given(data=st.data(), problem=convolutions() | products())
def test_channels_with_any_parameters(layout: str, data: st.DataObject, problem: Problem) -> None:
    small, packs = st.integers(1, 4), ["none", "window", "packed"]
    if isinstance(problem, Linear):
        packs = ["none"]
    elif is_flat(problem):
        packs = ["none", "packed"]
    check(problem, Channels(
        lanes=data.draw(st.sampled_from([4, 8, 16])), vectors=data.draw(small), rows=data.draw(small),
        pixels=data.draw(st.integers(1, 9)), block=data.draw(small), depth=data.draw(st.integers(1, 9)),
        unroll=data.draw(small), pack=data.draw(st.sampled_from(packs)),
        parallel=data.draw(st.sampled_from(["pixels", "channels"])),
        skip=data.draw(st.sampled_from(["", "h", "hw"])) if meets_input(problem) else "",
        tail=data.draw(st.sampled_from(["peel", "mask"])), align=data.draw(st.sampled_from([0, 0, 24])),
        prefetch=data.draw(st.sampled_from([0, 0, 3]))), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@FEW
@given(data=st.data(), problem=convolutions() | products())
def test_pixels_with_any_parameters(layout: str, data: st.DataObject, problem: Problem) -> None:
    small = st.integers(1, 4)
    check(problem, Pixels(
        lanes=data.draw(st.sampled_from([4, 8, 16])), maps=data.draw(small), rows=data.draw(small),
        vectors=data.draw(small), unroll_taps=data.draw(st.booleans()),
        peel_borders=data.draw(st.booleans()) and meets_input(problem),
        order=data.draw(st.sampled_from(["taps", "rows"]))), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@FEW
@given(data=st.data(), problem=convolutions(depthwise=True))
def test_depthwise_with_any_parameters(layout: str, data: st.DataObject, problem: Conv2d) -> None:
    small = st.integers(1, 4)
    check(problem, Depthwise(data.draw(st.sampled_from([4, 8, 16])), data.draw(small), data.draw(small),
                             data.draw(st.booleans())), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", [
    Conv2d(6, 20, 1, input_size=(3, 5), activation="relu"), Conv2d(6, 20, 3, padding=1, input_size=(5, 9)),
    Conv2d(6, 20, 3, stride=2, input_size=(9, 20)), Linear(6, 20, batch_size=7)], ids=str)
def test_the_last_tile_may_move_back(layout: str, problem: Problem) -> None:
    pack: Any = "none" if isinstance(problem, Linear) or not any(problem.padding) else "window"
    recipe = Channels(lanes=4, vectors=2, rows=1, pixels=4, block=5, depth=6, unroll=2, pack=pack, tail="overlap")
    assert "overlap" in recipe.schedule(problem, layout).text
    check(problem, recipe, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_strides_of_the_copy_are_apart(layout: str, groups: int) -> None:
    problem = Conv2d(64, 64, 3, padding=1, groups=groups, input_size=(6, 14))
    recipe = Channels(lanes=16, vectors=2, rows=1, pixels=7, block=2, depth=16, unroll=4, pack="window", align=1040)
    program = lower_direct(problem, layout)

    def strides(align: int) -> list[int]:
        scheduled = apply(program, replace(recipe, align=align).schedule(problem, layout))
        return [axis.stride for axis in scheduled.tensor("x_at_e0").storage]

    assert copy_stride(recipe, problem, layout) in strides(0)
    assert copy_stride(recipe, problem, layout) not in strides(1040)
    assert 1040 in strides(1040)


def test_weights_are_fetched_ahead() -> None:
    problem = Conv2d(20, 32, 1, input_size=7)
    recipe = Channels(lanes=16, vectors=2, rows=1, pixels=7, block=7, depth=20, unroll=4, pack="none", prefetch=8)
    check(problem, recipe, "nchw")
    nest = print_nest(apply(lower_direct(problem), recipe.schedule(problem)))
    assert "for c0 < 5 (w_packed 8 ahead):" in nest


def test_short_rows_have_half_a_register_and_many_sums_run_row_by_row() -> None:
    def default(channels: int, size: int, stride: int) -> Pixels:
        problem = Conv2d(channels, channels, 3, stride, padding=1, groups=channels, input_size=size)
        found = default_recipe(problem, Machine.example("avx512"))
        assert isinstance(found, Pixels)
        return found

    assert (default(1024, 7, 1).lanes, default(512, 14, 2).lanes, default(512, 14, 1).lanes) == (8, 8, 16)
    assert [default(64, size, 1).order for size in (7, 14, 28, 56)] == ["taps", "rows", "taps", "rows"]
