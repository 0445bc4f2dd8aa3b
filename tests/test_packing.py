"""What is bound: bit by bit what the bind stages mean, in blocks and without whole arrays beside the result."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import convsched as cs
from convsched.ir import Program
from convsched.ir.interp import evaluate_bind
from convsched.kernels.run import binding, packing
from convsched.kernels.run.kernel import Kernel
from convsched.kernels.run.packing import ALIGNMENT_BYTES, BLOCK_ELEMENTS, Copy, blocks, inside, plain
from convsched.machine import Machine, host
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import LAYOUTS
from convsched.schedule import apply

TINY = np.finfo(np.float32).tiny
CASES: list[tuple[str, Problem]] = [
    ("direct", Conv2d(5, 37, 3, padding=1, input_size=9)),
    ("direct", Conv2d(24, 60, 3, stride=2, groups=3, input_size=9)),
    ("direct", Conv2d(40, 40, 3, groups=40, input_size=9)),
    ("direct", Linear(300, 123)),
    ("im2col", Conv2d(5, 37, 3, padding=1, input_size=9)),
    ("im2col", Conv2d(12, 18, (1, 5), dilation=2, groups=2, input_size=(3, 20))),
    ("winograd", Conv2d(5, 37, 3, padding=1, input_size=9)),
    ("winograd", Conv2d(20, 24, (3, 5), stride=(2, 1), groups=2, padding=2, input_size=12)),
    ("winograd", Conv2d(20, 24, (1, 4), dilation=2, padding=3, input_size=12)),
    ("fft", Conv2d(5, 17, 5, padding=2, input_size=12)),
    ("fft(16)x(8)", Conv2d(3, 2, (1, 11), input_size=(1, 40))),
    ("strassen", Conv2d(7, 37, 3, padding=1, input_size=9)),
    ("strassen(2)", Linear(301, 123, batch_size=8)),
]


def scheduled(algorithm: str, problem: Problem, layout: str) -> Program:
    one, machine = named(algorithm, problem), Machine.example("avx512")
    return apply(one.lower(layout), one.default(machine, layout, 1).schedule(problem, layout))


def flushed(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.abs(values) < TINY, np.float32(0), values)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("algorithm", "problem"), CASES, ids=str)
def test_what_is_bound_is_what_the_bind_stages_mean(
    algorithm: str, problem: Problem, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With denormals among the weights, and blocks so small that every loop is cut."""
    monkeypatch.setattr("convsched.kernels.run.packing.BLOCK_ELEMENTS", 200)
    monkeypatch.setattr("convsched.kernels.run.binding.BLOCK_ELEMENTS", 2000)
    program = scheduled(algorithm, problem, layout)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(problem.weight_shape).astype(np.float32)
    weight[rng.random(weight.shape) < 0.1] *= TINY / 8
    found = binding.bindings(program)
    bound = binding.run(found, {"w": weight})
    assert [binding.from_json(json.loads(json.dumps(one.to_json()))) for one in found] == list(found)
    expected = evaluate_bind(program, {"w": weight})
    used = {name for name in expected if any(name == one.target for one in found)}
    assert set(bound) == used
    for name in bound:
        assert bound[name].ctypes.data % ALIGNMENT_BYTES == 0
        np.testing.assert_array_equal(bound[name], flushed(expected[name]), err_msg=name)


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e-14, 1e-30, 1e-37])
@pytest.mark.parametrize(("algorithm", "size"), [("winograd(2,3)", 3), ("winograd(4,3)", 3), ("fft(8)", 3),
                                                 ("strassen(1)", 1)])
def test_transformed_weights_are_never_denormal(algorithm: str, size: int, scale: float) -> None:
    """Whole numbers, so that many sums cancel but for their rounding, at sizes from which denormals come or not."""
    problem = Conv2d(32, 32, size, input_size=9)
    program = scheduled(algorithm, problem, "nchw")
    weight = np.random.default_rng(0).choice([-3, -2, -1, 1, 2, 3], problem.weight_shape) * np.float32(scale)
    weight = weight.astype(np.float32)
    bound, expected = binding.run(binding.bindings(program), {"w": weight}), evaluate_bind(program, {"w": weight})
    for name, array in bound.items():
        assert np.array_equal(array, flushed(array))
        np.testing.assert_allclose(array, flushed(expected[name]), rtol=1e-6, atol=1e-12 * scale)


@pytest.mark.parametrize(("algorithm", "problem"), [
    ("direct", Linear(1024, 1500)), ("direct", Conv2d(96, 200, 7, input_size=7)), ("direct", Linear(2048, 1030)),
    ("im2col", Conv2d(96, 200, 7, padding=3, input_size=7)), ("winograd", Conv2d(128, 136, 3, padding=1, input_size=9)),
    ("fft", Conv2d(32, 40, 7, padding=3, input_size=20)), ("strassen", Conv2d(128, 131, 3, padding=1, input_size=9)),
], ids=str)
def test_binding_takes_few_bytes_beside_its_result(algorithm: str, problem: Problem) -> None:
    """Some blocks, of 4 bytes an element when copied and of 8 when transformed."""
    kernel = Kernel(Plan.of(named(algorithm, problem), Target(host.machine())))
    weight, bias = np.ones(problem.weight_shape, np.float32), np.zeros(problem.M, np.float32)
    kernel.bind(weight, bias)
    tracemalloc.start()
    try:
        bound = kernel.bind(weight, bias)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    result = sum(array.nbytes for array in bound.weights.values())
    copied = all(isinstance(one, Copy) for one in kernel.code.interface.bindings)
    assert result > 4 * BLOCK_ELEMENTS * 4
    assert peak - result < (3 * 4 if copied else 8 * 8) * BLOCK_ELEMENTS


@pytest.mark.parametrize(("algorithm", "problem", "most"), [
    ("direct", Linear(2304, 1024), 2), ("direct", Conv2d(256, 128, 7, input_size=7), 2),
    ("direct", Conv2d(64, 250, 3, input_size=9), 4), ("winograd(4,3)", Conv2d(256, 256, 3, input_size=14), 2),
], ids=str)
def test_binding_takes_few_blocks(algorithm: str, problem: Problem, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is some calls of NumPy, of some us: many of its elements are to share them."""
    sizes: list[int] = []
    for module in (packing, binding):
        monkeypatch.setattr(module, "flush_denormals", lambda values: sizes.append(values.size))
    weight = np.ones(problem.weight_shape, np.float32)
    for one in binding.bindings(scheduled(algorithm, problem, "nchw")):
        one.run(weight)
    assert BLOCK_ELEMENTS * len(sizes) <= most * sum(sizes)


def test_copies_of_all_sizes_and_orders() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape = tuple(int(n) for n in rng.integers(1, 40, rng.integers(1, 5)))
        order = rng.permutation(len(shape))
        strides = np.zeros(len(shape), int)
        strides[order] = np.cumprod([1, *(shape[i] for i in order[:-1])])
        identity = tuple(tuple(int(i == j) for j in range(len(shape))) for i in range(len(shape)))
        source = rng.standard_normal(shape).astype(np.float32)
        copy = Copy("t", "s", source.size, tuple(map(int, strides)), shape, identity, (0,) * len(shape))
        np.testing.assert_array_equal(copy.run(source), source.transpose(order[::-1]).reshape(-1))
        np.testing.assert_array_equal(plain("s", source).run(source), source.reshape(-1))


def test_only_what_lies_inside_is_copied() -> None:
    """Tails, a start before the source, and a loop that runs backwards."""
    source = np.arange(1, 8, dtype=np.float32)
    assert Copy("t", "s", 8, (4, 1), (2, 4), ((4, 1),), (0,)).run(source).tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert Copy("t", "s", 9, (1,), (9,), ((1,),), (-1,)).run(source).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert Copy("t", "s", 9, (1,), (9,), ((-1,),), (7,)).run(source).tolist() == [0, 7, 6, 5, 4, 3, 2, 1, 0]
    assert Copy("t", "s", 3, (1,), (3,), ((1,),), (9,)).run(source).tolist() == [0, 0, 0]


def test_boxes_inside_are_apart_and_complete() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        extents = rng.integers(1, 7, 3).tolist()
        limits = [(int(rng.integers(-4, 5)), tuple(rng.integers(-3, 6, 3).tolist()), int(rng.integers(1, 20)))
                  for _ in range(2)]
        seen = np.zeros(extents, int)
        for box in inside(limits, tuple(slice(0, extent) for extent in extents)):
            seen[box] += 1
        point = np.indices(extents)
        values = [constant + sum(k * axis for k, axis in zip(row, point, strict=True)) for constant, row, _ in limits]
        right = np.logical_and.reduce([(value >= 0) & (value < limit[2])
                                       for value, limit in zip(values, limits, strict=True)])
        np.testing.assert_array_equal(seen, right)


def test_blocks_cover_their_loops_once() -> None:
    seen = np.zeros((5, 7), int)
    for block in blocks((5, 7), (2, 7)):
        seen[block] += 1
    assert seen.tolist() == np.ones((5, 7)).tolist()


def test_weights_that_are_not_finite_bind_without_a_warning() -> None:
    problem = Conv2d(4, 4, 3, padding=1, input_size=8, bias=False)
    weight = np.ones(problem.weight_shape, np.float32)
    weight[0, 0, 0, 0], weight[1, 1, 1, 1] = np.inf, np.nan
    for algorithm in ("direct", "winograd", "fft", "strassen"):
        bound = cs.compile(problem, algorithm=algorithm, threads=1, accuracy="fast").bind(weight)
        assert not all(np.isfinite(array).all() for array in bound.weights.values())
