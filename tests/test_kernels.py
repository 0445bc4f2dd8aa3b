"""Compiled kernels against the float64 oracle, over every parameter of a problem.

Data of small integers makes every sum exact in float32, so those results are compared for equality. The
smooth activations are held to max |error| / rms(output) <= 1e-5, the accuracy class "strict".
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convsched as cs
from convsched.ir.interp import interpret
from convsched.kernels.run.kernel import Kernel
from convsched.machine import Isa, Machine, host
from convsched.plan.defaults import default_recipe
from convsched.plan.families import applicable, named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d, Linear, Problem, layout
from convsched.problem.layout import activation_shape, from_layout, to_layout
from convsched.problem.reference import convolve
from convsched.problem.rules import Activation

LAYOUTS = tuple(layout.LAYOUTS)
EXACT: list[Activation] = [None, "relu", "relu6", ("clip", -9.0, 20.0), ("leaky_relu", 0.5)]
SMOOTH: list[Activation] = ["sigmoid", "tanh", "silu", "hardswish", "hardsigmoid", ("elu", 1.5)]
STRICT = 1e-5  # max |error| / rms(output)
GUARD = 64  # elements before and after an output that must stay as they are

RUNS: dict[Isa, tuple[Isa, ...]] = {
    "avx512": ("avx512", "avx2", "sse"),
    "avx2": ("avx2", "sse"),
    "sse": ("sse",),
    "neon": ("neon",),
    "generic": (),
}

FEW = settings(max_examples=settings().max_examples // 3)  # each is compiled


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVSCHED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Problems

channels = st.sampled_from([1, 2, 3, 4, 5, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65]) | st.integers(1, 40)
small_pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
pads = st.tuples(*[st.integers(0, 3)] * 4)


@st.composite
def convolutions(draw: st.DrawFn, activations: list[Activation] = EXACT) -> Conv2d:
    """Every parameter of Conv2d, up to some hundred thousand multiply-adds."""
    match draw(st.sampled_from(["dense", "pointwise", "grouped", "depthwise"])):
        case "grouped":
            groups = draw(st.integers(2, 5))
            c, m = groups * draw(st.integers(1, 18)), groups * draw(st.integers(1, 34))
        case "depthwise":
            groups = c = draw(channels)
            m = groups * draw(st.sampled_from([1, 1, 1, 2, 3]))
        case _:
            groups, c, m = 1, draw(channels), draw(channels)
    pointwise = draw(st.integers(0, 3)) == 0
    kernel = (1, 1) if pointwise else draw(st.sampled_from([(3, 3), (5, 5), (1, 7), (7, 1)]) | small_pair)
    stride = draw(st.sampled_from([(1, 1), (2, 2)]) | small_pair)
    dilation = draw(st.just((1, 1)) | small_pair)
    padding: Any = draw(st.sampled_from(["valid", "same", tuple(k // 2 for k in kernel)]) | pads)
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(st.integers(1, 10)), draw(st.integers(1, 36))]
    if draw(st.booleans()):
        size.reverse()
    if padding == "valid":
        size = [max(a, b) for a, b in zip(size, extents, strict=True)]
    elif padding != "same":
        before, after = (padding[:2], padding[-2:])
        size = [max(a, b - p - q) for a, b, p, q in zip(size, extents, before, after, strict=True)]
    return Conv2d(
        c, m, kernel, stride, padding, dilation, groups, draw(st.booleans()),
        input_size=(size[0], size[1]), batch_size=draw(st.sampled_from([1, 1, 2, 3])),
        activation=draw(st.sampled_from(activations)), residual=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def linears(draw: st.DrawFn) -> Linear:
    return Linear(
        draw(st.integers(1, 150)), draw(st.integers(1, 150)), draw(st.booleans()),
        batch_size=draw(st.sampled_from([1, 2, 3, 16, 17, 40])), activation=draw(st.sampled_from(EXACT)),
        residual=draw(st.booleans()),
    )  # fmt: skip


problems = convolutions() | linears()


# Data and the comparison

def integers(problem: Problem, seed: int) -> list[Any]:
    """x, weight, bias, residual of integers up to 3."""
    rng = np.random.default_rng(seed)
    return [None if s is None else rng.integers(-3, 4, s).astype(np.float32) for s in shapes(problem)]


def normal(problem: Problem, seed: int) -> list[Any]:
    """x, weight, bias, residual from the normal distribution, the sums of products of variance 1 too."""
    rng = np.random.default_rng(seed)
    data = [None if s is None else rng.standard_normal(s, np.float32) for s in shapes(problem)]
    data[1] /= np.sqrt(np.float32(problem.weights // problem.M))
    return data


def shapes(problem: Problem) -> tuple[tuple[int, ...] | None, ...]:
    return (problem.input_shape, problem.weight_shape, problem.bias_shape if problem.bias else None,
            problem.output_shape if problem.residual else None)  # fmt: skip


def run(kernel: Kernel, data: list[Any]) -> Any:
    """The (N, M, E, F) output, after checks that all of it and nothing else was written."""
    x, weight, bias, residual = data
    shape = activation_shape(kernel.problem.output_shape, kernel.layout)
    elements = int(np.prod(shape))
    memory = np.full(elements + 2 * GUARD, np.nan, np.float32)
    out = memory[GUARD:-GUARD].reshape(shape)
    given_residual = None if residual is None else to_layout(residual, kernel.layout)
    y = kernel(to_layout(x, kernel.layout), weight, bias, out=out, residual=given_residual)
    assert y is out
    assert np.isnan(memory[:GUARD]).all()
    assert np.isnan(memory[-GUARD:]).all()
    if kernel.layout == "nchw16c" and out.ndim == 5 and kernel.problem.M % 16:
        assert not out[:, -1, :, :, kernel.problem.M % 16:].any()
    return from_layout(out, kernel.problem.output_shape, kernel.layout)


def check_exact(kernel: Kernel, seed: int) -> None:
    data = integers(kernel.problem, seed)
    np.testing.assert_array_equal(run(kernel, data), convolve(kernel.problem, *data), kernel.schedule.text)


def for_machine(problem: Problem, layout: Any, machine: Machine) -> Kernel:
    """The default kernel for another machine."""
    recipe = default_recipe(problem, machine, layout, 1)
    return Kernel(Plan.of(named("direct", problem), Target(machine, layout), recipe))


# Tests

@FEW
@given(problems, st.sampled_from(LAYOUTS), st.integers(0, 9))
def test_kernels_equal_the_oracle(problem: Problem, layout: Any, seed: int) -> None:
    check_exact(cs.compile(problem, algorithm="direct", layout=layout, threads=1), seed)


@FEW
@given(problems, st.sampled_from(LAYOUTS), st.integers(0, 9))
def test_unscheduled_kernels_equal_the_oracle(problem: Problem, layout: Any, seed: int) -> None:
    check_exact(cs.compile(problem, schedule=cs.Schedule(), layout=layout, threads=1), seed)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse", "neon"])
@FEW
@given(problem=problems, layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 9))
def test_kernels_for_each_instruction_set_equal_the_oracle(
    isa: Isa, problem: Problem, layout: Any, seed: int
) -> None:
    if isa not in RUNS[host.machine().isa]:
        pytest.skip(f"this host cannot run {isa}")
    check_exact(for_machine(problem, layout, Machine.example(isa)), seed)


@FEW
@given(convolutions([None, "relu", "relu6"]), st.sampled_from(LAYOUTS), st.integers(0, 9))
def test_infinities_and_nans_reach_their_outputs(problem: Conv2d, layout: Any, seed: int) -> None:
    """By every algorithm that says so."""
    data = integers(problem, seed)
    rng = np.random.default_rng(seed)
    for value in (np.inf, -np.inf, np.nan):
        data[0][rng.random(problem.input_shape) < 0.01] = value
    with np.errstate(invalid="ignore"):
        expected = convolve(problem, *data)
    for algorithm in applicable(problem):
        if algorithm.is_exact:
            y = run(cs.compile(problem, algorithm=algorithm.name, layout=layout, threads=1), data)
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("problem", [Conv2d(4, 4, 3, padding=1, input_size=12, bias=False),
                                     Conv2d(4, 4, 3, 2, padding=1, groups=2, input_size=13, bias=False),
                                     Linear(8, 4, bias=False, batch_size=4)], ids=str)
def test_an_algorithm_says_whether_it_keeps_infinities_where_they_belong(problem: Problem) -> None:
    x, weight = np.ones(problem.input_shape, np.float32), np.ones(problem.weight_shape, np.float32)
    x.reshape(-1)[x.size // 3] = np.inf
    expected = convolve(problem, x, weight)
    assert np.isinf(expected).any()
    assert not np.isnan(expected).any()
    tried = list(applicable(problem))
    assert len(tried) >= 2
    for algorithm in tried:
        program = algorithm.lower("nchw")
        given = {"x": x.reshape(program.tensor("x").shape), "w": weight.reshape(program.tensor("w").shape)}
        found = interpret(program, given)["y"].reshape(problem.output_shape)
        assert np.array_equal(found, expected) == algorithm.is_exact, algorithm.name
        assert algorithm.fits("strict") == algorithm.is_exact


NORMAL_LAYERS: list[dict[str, Any]] = [
    {"c": 40, "m": 24, "kernel_size": 3, "padding": 1, "input_size": 9, "residual": True},
    {"c": 33, "m": 17, "kernel_size": 1, "input_size": (5, 7), "bias": False},
    {"c": 20, "m": 20, "kernel_size": 3, "stride": 2, "padding": "same", "groups": 20, "input_size": 19},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [*EXACT, *SMOOTH], ids=str)
def test_normal_data_is_within_the_strict_bound(activation: Activation, layout: Any) -> None:
    for sizes in NORMAL_LAYERS:
        arguments = dict(sizes)
        problem = Conv2d(arguments.pop("c"), arguments.pop("m"), **arguments, activation=activation)
        data = normal(problem, 0)
        expected = convolve(problem, *data)
        y = run(cs.compile(problem, layout=layout, threads=1), data)
        assert np.abs(y - expected).max() <= STRICT * np.sqrt(np.mean(expected**2)), problem


@pytest.mark.parametrize("activation", [*EXACT, *SMOOTH], ids=str)
def test_activations_of_large_numbers_and_nan(activation: Activation) -> None:
    """Through a 1x1 layer with weight 1: saturated, never infinite or NaN where the limit is finite."""
    values = [0.0, -0.0, 1e-30, -1e-30, 5.0, -5.0, 30.0, -30.0, 100.0, -100.0, 1e30, -1e30, np.nan]
    x = np.array(values, np.float32).reshape(1, 1, 1, -1)
    problem = Conv2d(1, 1, 1, bias=False, input_size=x.shape[2:], activation=activation)
    data: list[Any] = [x, np.ones((1, 1, 1, 1), np.float32), None, None]
    y = run(cs.compile(problem, threads=1), data)
    np.testing.assert_allclose(y, convolve(problem, *data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_twice_the_text_is_the_same(layout: Any) -> None:
    problem = Conv2d(24, 40, 3, padding=1, input_size=10, activation="silu")
    first, second = (cs.compile(problem, layout=layout, threads=1) for _ in range(2))
    assert first.llvm == second.llvm
    assert first.nest == second.nest


def test_tails_of_blocked_inputs_may_hold_nothing_but_zeros_and_outputs_feed_the_next_layer() -> None:
    first = Conv2d(3, 20, 3, padding=1, input_size=8, activation="relu")
    second = Conv2d(20, 5, 3, padding=1, input_size=8)
    one, two = integers(first, 0), integers(second, 1)
    between = cs.compile(first, layout="nchw16c", threads=1)(to_layout(one[0], "nchw16c"), *one[1:3])
    y = cs.compile(second, layout="nchw16c", threads=1)(between, *two[1:3])
    expected = convolve(second, convolve(first, *one), *two[1:3])
    np.testing.assert_array_equal(from_layout(y, second.output_shape, "nchw16c"), expected)
