"""FFT tiles as kernels: any sizes and recipe parameters, folded or not, all layouts, both backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convsched as cs
from convsched.algebra.fft import part_of_tile
from convsched.errors import LoweringError
from convsched.ir import Program
from convsched.ir.interp import interpret
from convsched.kernels.emit.llvm import emit
from convsched.kernels.run import binding
from convsched.kernels.source.printer import run_source
from convsched.machine import host
from convsched.plan.families import fft, named
from convsched.problem import Conv2d
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.reference import convolve
from convsched.recipes.tiles import Tiles
from convsched.schedule import Schedule, Unroll, apply, parse_schedule

FEW = settings(max_examples=settings().max_examples // 12)  # each is interpreted, or compiled
LAYOUTS = ("nchw", "nhwc", "nchw16c")
EXACT = 1e-9  # float64 rounding of the transforms
FLOAT32 = 1e-5  # of max |error| / rms, the bound of accuracy="strict"

CASES = {  # member: the sides of the filters it is for
    "fft(8)": ((3, 3), (5, 2), (7, 8), (1, 5), (6, 1)),
    "fft(16)": ((3, 9), (1, 12), (9, 1)),
    "fft(8)x(16)": ((3, 9), (1, 40), (17, 1)),
    "fft(4)x(2)": ((1, 3), (2, 1)),
    "fft(32)x(8)": ((1, 75), (50, 1)),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Conv2d]:
    """A member and a small layer for it."""
    name = draw(st.sampled_from(sorted(CASES)))
    r, s = draw(st.sampled_from(CASES[name]))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    size = (draw(st.integers(r, r + 9)), draw(st.integers(s, s + 17)))
    channels = st.sampled_from([1, 3, 4, 8, 16, 17])
    return name, Conv2d(draw(channels), draw(channels), (r, s), 1, padding,
                        bias=draw(st.booleans()), input_size=size, batch_size=draw(st.sampled_from([1, 1, 2])),
                        activation=draw(st.sampled_from([None, "relu"])), residual=draw(st.booleans()))


def data_of(program: Program) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {t.name: rng.integers(-3, 4, t.shape).astype(np.float32)
            for t in program.tensors if t.role in ("input", "weight")}


def expected(problem: Conv2d, data: dict[str, Any]) -> Any:
    residual = data["z"].reshape(problem.output_shape) if "z" in data else None
    return convolve(problem, data["x"], data["w"], data.get("b"), residual)


def random_recipe(draw: Any, problem: Conv2d, name: str) -> Tiles:
    """The tiles of a member with any other parameters."""
    tiles = fft(problem, tuple(int(n) for n in name[4:-1].split(")x(")))
    rows = tiles.plane.tiles[0]
    by_lines = st.just(True) if max(tiles.shape.points) > 12 else st.booleans()
    return Tiles(
        lanes=draw(st.sampled_from([4, 8, 16])), shape=tiles.shape,
        block=draw(st.sampled_from([b for b in range(1, rows + 1) if rows % b == 0])),
        vectors=draw(st.integers(1, 3)), pixels=draw(st.integers(1, 9)), unroll=draw(st.sampled_from([1, 2, 4])),
        by_lines=draw(by_lines))


@FEW
@given(case=cases(), layout=st.sampled_from(LAYOUTS))
def test_the_program_is_the_convolution(case: tuple[str, Conv2d], layout: str) -> None:
    """Unscheduled, and in float64, so that what is left is the rounding of the interpreter."""
    name, problem = case
    program = named(name, problem).lower(layout)
    data = data_of(program)
    wanted = expected(problem, data)
    found = interpret(program, data, np.float64)["y"].reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT * max(1.0, float(np.abs(wanted).max())))


@FEW
@given(data=st.data(), case=cases(), layout=st.sampled_from(LAYOUTS))
def test_any_recipe(data: st.DataObject, case: tuple[str, Conv2d], layout: str) -> None:
    name, problem = case
    schedule = random_recipe(data.draw, problem, name).schedule(problem, layout)
    assert parse_schedule(schedule.text) == schedule == Schedule.from_json(schedule.to_json())
    program = apply(named(name, problem).lower(layout), schedule)
    given_data = data_of(program)
    wanted = expected(problem, given_data)
    scale = max(1.0, float(np.abs(wanted).max()))
    exact = interpret(program, given_data, np.float64)["y"].reshape(wanted.shape)
    np.testing.assert_allclose(exact, wanted, rtol=0, atol=EXACT * scale)


@pytest.mark.parametrize(("name", "problem"), [
    ("fft(4)", Conv2d(3, 5, 3, padding=1, input_size=(5, 6), activation="relu")),
    ("fft(8)x(4)", Conv2d(2, 3, (1, 5), input_size=(1, 20), bias=False, residual=True)),
])  # fmt: skip
def test_source(name: str, problem: Conv2d) -> None:
    """The second backend reads constants from tables of its own."""
    algorithm = named(name, problem)
    schedule = algorithm.default(host.machine(), "nchw", 1).schedule(problem)
    program = apply(algorithm.lower("nchw"), schedule)
    data = data_of(program)
    wanted = expected(problem, data)
    found = run_source(program, data)["y"].reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FLOAT32 * np.abs(wanted).max())


def run(problem: Conv2d, name: str, layout: Any = "nchw", threads: int = 1, schedule: Any = None) -> float:
    """max |error| / rms of a kernel on normal data."""
    kernel = cs.compile(problem, algorithm=name, layout=layout, threads=threads, schedule=schedule, cache=False)
    rng = np.random.default_rng(1)
    x, w, b, z = (rng.standard_normal(shape).astype(np.float32) for shape in (
        problem.input_shape, problem.weight_shape, problem.bias_shape, problem.output_shape))
    bias, residual = b if problem.bias else None, z if problem.residual else None
    out = np.full(kernel.y_shape, np.nan, np.float32)
    kernel(to_layout(x, layout), w, bias, residual=None if residual is None else to_layout(residual, layout), out=out)
    wanted = convolve(problem, x, w, bias, residual)
    found = from_layout(out, problem.output_shape, layout)
    return float(np.abs(found - wanted).max() / max(1.0, np.sqrt(np.square(wanted).mean())))


@FEW
@given(case=cases(), layout=st.sampled_from(LAYOUTS), threads=st.sampled_from([1, 2]))
def test_kernels(case: tuple[str, Conv2d], layout: str, threads: int) -> None:
    assert run(case[1], case[0], layout, threads) < FLOAT32


@FEW
@given(data=st.data(), case=cases(), layout=st.sampled_from(LAYOUTS))
def test_kernels_of_any_recipe(data: st.DataObject, case: tuple[str, Conv2d], layout: str) -> None:
    name, problem = case
    schedule = random_recipe(data.draw, problem, name).schedule(problem, layout)
    assert run(problem, name, layout, 1, schedule) < FLOAT32


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("problem", "member"), [
    (Conv2d(16, 16, 31, padding=15, input_size=(40, 56)), "fft(64)"),
    (Conv2d(16, 16, (1, 256), padding=(0, 127, 0, 128), input_size=(1, 1000)), "fft(32)x(32)"),
    (Conv2d(16, 16, (300, 1), input_size=(700, 2)), "fft(32)x(32)"),
])  # fmt: skip
def test_large_filters(problem: Conv2d, member: str, threads: int) -> None:
    """The default member and recipe, more accurate than sums of as many products."""
    assert named("fft", problem).name == member
    kernel = cs.compile(problem, algorithm="fft", threads=threads, cache=False)
    assert kernel.algorithm == member
    assert isinstance(kernel.recipe, Tiles)
    assert kernel.recipe.by_lines
    error = run(problem, "fft", threads=threads)
    prediction = named("fft", problem).prediction
    assert prediction.expected / 3 < error < 2 * prediction.expected
    assert prediction.expected < named("direct", problem).prediction.expected
    assert error < prediction.worst


def test_constants_come_from_a_table_where_loops_run() -> None:
    """An element of a constant that only run time knows is loaded; one of an unrolled loop is a literal."""
    machine, problem = host.machine(), Conv2d(16, 16, 5, input_size=(12, 12))
    algorithm = named("fft(8)", problem)
    steps = algorithm.default(machine, "nchw", 1).schedule(problem).steps
    looped = Schedule(tuple(replace(step, loops=tuple(loop for loop in step.loops if loop not in ("px1", "k1")))
                            if isinstance(step, Unroll) else step for step in steps))
    long, short = (apply(algorithm.lower("nchw"), schedule) for schedule in (looped, Schedule(steps)))
    text = emit(long, machine)
    assert [line.split(" = ")[0] for line in text.splitlines() if "private unnamed_addr constant" in line] == ["@B1"]
    assert "@B1" not in emit(short, machine)
    assert emit(long, machine) == text


def test_folded_filters_bind_as_plain_data() -> None:
    problem = Conv2d(3, 2, (1, 11), input_size=(1, 40))
    program = named("fft(16)x(8)", problem).lower("nchw")
    found = binding.bindings(program)
    assert [binding.from_json(one.to_json()) for one in found] == list(found)
    w = np.random.default_rng(0).standard_normal(problem.weight_shape).astype(np.float32)
    tiles = fft(problem, (16, 8))
    padded = np.zeros((2, 3, tiles.column.taps, 4))
    padded.reshape(2, 3, -1)[:, :, :11] = w[:, :, 0]
    A, B = (side.triple.filter.matrix.array() for side in (tiles.column, tiles.row))
    u = binding.run(found, {"w": w})["u"].reshape(len(A), len(B), 2, 3)
    np.testing.assert_allclose(u, np.einsum("gr,hs,mcrs->ghmc", A, B, padded), atol=1e-6)


@pytest.mark.parametrize(("n", "r", "m"), [(8, 3, 6), (8, 3, 1), (8, 3, 4), (16, 16, 1), (2, 1, 2)])
def test_part_of_a_tile(n: int, r: int, m: int) -> None:
    triple = part_of_tile(n, r, m)
    rng = np.random.default_rng(n)
    w, x = rng.standard_normal(r), rng.standard_normal(m + r - 1)
    A, B, C = (part.matrix.array() for part in (triple.filter, triple.input, triple.output))
    assert triple.rank == 3 * n // 2
    np.testing.assert_allclose(C @ ((A @ w) * (B @ x)), np.correlate(x, w), atol=1e-12)


def test_errors() -> None:
    layer = Conv2d(4, 4, 5, input_size=(12, 12))
    for name, why in {
        "fft(4)": r"fft\(4\): a tile for 5 taps has a power of two of points, from 5 on",
        "fft(12)": r"fft\(12\): a tile for 5 taps has a power of two of points, from 5 on",
        "fft(4,3)": r"algorithm='fft' has the points of a tile as its sizes: write fft\(64\)",
    }.items():
        with pytest.raises(LoweringError, match=why):
            named(name, layer)
    with pytest.raises(LoweringError, match="has one tap; use direct"):
        named("fft", Conv2d(4, 4, 1, input_size=(12, 12)))
    with pytest.raises(LoweringError, match="has a stride, a dilation or groups; use direct"):
        named("fft", Conv2d(4, 4, 3, 2, input_size=(12, 12)))
    with pytest.raises(LoweringError, match="more taps than a tile of 128 points"):
        named("fft", Conv2d(1, 1, (129, 2), input_size=(200, 12)))
    with pytest.raises(LoweringError, match=r"fft\(8\): a tile of 8 has up to 6 outputs of 3 taps, not 7"):
        part_of_tile(8, 3, 7)
