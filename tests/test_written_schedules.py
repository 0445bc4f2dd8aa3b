"""Schedules written by hand, down to machine code: packing loops, registers, parallel loops in odd places."""

from __future__ import annotations

import numpy as np
import pytest

import convsched as cs
from convsched.errors import ScheduleError
from convsched.ir.interp import evaluate_bind
from convsched.problem import Problem
from convsched.problem.reference import convolve

LAYER = cs.Conv2d(16, 32, 3, padding=1, input_size=(14, 14), activation="relu")
BASE = """
    split m 16 -> m0 m1; split f 14 -> f0 f1; reorder m0 e f0 c r s f1 m1
    attach init at f0; attach epilogue at f0; stage t at f0 registers
    layout w m0 c r s m1; unroll f1; vectorize m1
"""


@pytest.mark.parametrize("steps", [
    "split w.m0 2 -> wa wb", "reorder w.r w.c", "unroll w.s", "vectorize w.m1", "parallel w.m0",
    "layout b m0 m1", "stage b at m0 window m",
])
def test_packing_loops_take_steps(steps: str) -> None:
    rng = np.random.default_rng(0)
    shapes = (LAYER.input_shape, LAYER.weight_shape, LAYER.bias_shape)
    x, weight, bias = (rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes)
    kernel = cs.compile(LAYER, schedule=f"{BASE}; {steps}")
    np.testing.assert_array_equal(kernel(x, weight, bias), convolve(LAYER, x, weight, bias))


@pytest.mark.parametrize("tail", ["mask", "peel"])
def test_ragged_packing_is_refused(tail: str) -> None:
    with pytest.raises(ScheduleError, match="split its loops into equal parts") as caught:
        cs.compile(LAYER, schedule=f"{BASE}; split w.c 5 -> wa wb tail={tail}")
    assert "pack w (bind):" in caught.value.nest


@pytest.mark.parametrize("steps", [
    "layout w m c; layout w_packed c m/2 m%2", "layout w m c; layout w_packed m c/4 c%4",
    "layout w m c; layout w_packed m/3 c/2 m%3 c%2", "layout w m c; layout w_packed c/5 m c%5; split w.c 3 -> a b",
    "split m 3 -> m0 m1 tail=mask; layout w m0 c m1; layout w_packed c/4 m1/2 m0 m1%2 c%4",
    "layout w m c; layout w_packed c/4 m c%4; layout w_packed m c",
])
def test_packed_weights_stored_in_blocks_that_are_not_loops(steps: str) -> None:
    """Blocks that are full and not, of loops that are whole and split."""
    layer = cs.Conv2d(6, 4, 1, bias=False, input_size=3)
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (layer.input_shape, layer.weight_shape))
    kernel = cs.compile(layer, algorithm="direct", schedule=steps, threads=1, cache=False)
    np.testing.assert_array_equal(kernel(x, weight), convolve(layer, x, weight))
    bound, expected = kernel.bind(weight), evaluate_bind(kernel.plan.program, {"w": weight})
    for name in bound.weights:
        np.testing.assert_array_equal(bound.weights[name], expected[name], err_msg=name)


@pytest.mark.parametrize("steps", ["peel gx1 last; unroll gx2 gx1", "unroll gx2; peel gx1 first; unroll gx1"])
def test_unrolled_loops_of_which_no_iteration_does_anything(steps: str) -> None:
    """Some copies of the nest have only products with zeros of a sparse matrix."""
    layer = cs.Conv2d(2, 2, 1, 2, input_size=(3, 6))
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (
        layer.input_shape, layer.weight_shape, layer.bias_shape))
    kernel = cs.compile(layer, algorithm="strassen(1)", schedule=steps, threads=1, cache=False)
    np.testing.assert_array_equal(kernel(x, weight, bias), convolve(layer, x, weight, bias))


def test_zeros_of_the_border_and_elements_at_the_same_address_are_told_apart() -> None:
    """x[0, 0, 0, 1] lies in the border, where x[0, 0, 1, 0] is stored."""
    layer = cs.Conv2d(1, 2, (1, 2), padding=(0, 0, 0, 1), input_size=(2, 1), bias=False)
    x = np.array([2, 3], np.float32).reshape(layer.input_shape)
    weight = np.array([1, 5, 7, 11], np.float32).reshape(layer.weight_shape)
    kernel = cs.compile(layer, schedule="reorder n c s e f m; attach init at n; attach epilogue at n;"
                                        "stage t at n registers; unroll s e; vectorize m")
    np.testing.assert_array_equal(kernel(x, weight), convolve(layer, x, weight))


@pytest.mark.parametrize(("algorithm", "schedule"), [
    ("direct", "reorder n c r s e f m; unroll e f; vectorize m"),
    ("im2col", "reorder n c r s p m; inline i; unroll p; vectorize m"),
])
def test_elements_at_one_address_in_and_outside_a_row(algorithm: str, schedule: str) -> None:
    """x[0, 0, 0, 4] lies in the border, where x[0, 0, 1, 0] is stored: rows of output are longer than those of x."""
    layer = cs.Conv2d(1, 8, 3, padding=2, input_size=(4, 4), bias=False)
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(1, 9, shape).astype(np.float32) for shape in (layer.input_shape, layer.weight_shape))
    kernel = cs.compile(layer, algorithm=algorithm, schedule=schedule, threads=1)
    np.testing.assert_array_equal(kernel(x, weight), convolve(layer, x, weight))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("layer", "schedule"), [
    # a parallel loop that a thread may skip, before code that uses the same registers
    (cs.Conv2d(6, 3, (1, 2), groups=3, input_size=(5, 4)),
     "split e 2 -> e1o e1i tail=mask; reorder g n m e1o e1i c s f; attach init at e1i; attach epilogue at e1i;"
     "stage t at e1i registers; vectorize f; parallel e1o; peel g first"),
    # a register tensor indexed by a parallel loop of one iteration
    (cs.Linear(2, 3, bias=False),
     "attach init at m; attach epilogue at m; stage t at n registers; split m 3 -> m0 m1; unroll m1; parallel m0"),
])
def test_parallel_loops_and_registers(layer: Problem, schedule: str, threads: int) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.integers(-3, 4, shape).astype(np.float32)
                       for shape in (layer.input_shape, layer.weight_shape, layer.bias_shape))
    given = bias if layer.bias else None
    kernel = cs.compile(layer, schedule=schedule, threads=threads)
    np.testing.assert_array_equal(kernel(x, weight, given), convolve(layer, x, weight, given))
