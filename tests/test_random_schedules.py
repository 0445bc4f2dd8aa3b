"""A random legal schedule of a random layer computes what the unscheduled nest computes, exactly.

Steps are drawn for the program at hand, alone or among those of a recipe, some of which are left out; those that raise
ScheduleError are skipped, and nothing else may raise. The result is also run as a machine would: the lanes of vector
loops statement by statement and in reverse, threads one after another from the last, each with local tensors of its
own. Results are compared exactly where the algorithm's arithmetic is exact on small integers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convsched.errors import LoweringError, ScheduleError, VerifyError
from convsched.ir import Program, Reduce, leaves, loads, loop_names
from convsched.ir.interp import interpret
from convsched.ir.verify import verify
from convsched.kernels.run.kernel import Kernel
from convsched.kernels.source.printer import run_source
from convsched.machine import Machine, host
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.reference import convolve
from convsched.schedule import (
    Attach,
    Fuse,
    Inline,
    Layout,
    Parallel,
    Peel,
    Prefetch,
    Reorder,
    Schedule,
    Skip,
    Split,
    StageAt,
    Step,
    Unroll,
    Vectorize,
    apply,
    parse_schedule,
)

sys.path.insert(0, str(Path(__file__).parent))

from machine_order import lanes_apart, threaded

Draw: TypeAlias = Callable[..., Any]
Array: TypeAlias = np.ndarray[Any, Any]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A layer of at most a few thousand multiply-adds."""
    activation = draw(st.sampled_from([None, "relu"]))
    bias, residual = draw(st.booleans()), draw(st.booleans())
    batch = draw(st.integers(1, 2))
    if draw(st.integers(0, 5)) == 0:
        return Linear(draw(st.integers(1, 9)), draw(st.integers(1, 9)), bias=bias, batch_size=draw(
            st.integers(1, 9)), activation=activation)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    pointwise = draw(st.integers(0, 3)) == 0
    kernel = (1, 1) if pointwise else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    stride = (1, 1) if pointwise else (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (0,) * 4 if pointwise else draw(st.tuples(*[st.integers(0, 2)] * 4))
    size = tuple(max(draw(st.integers(1, 7)), d * (k - 1) + 1 - before - after)
                 for k, d, before, after in zip(kernel, dilation, padding[:2], padding[2:], strict=True))
    return Conv2d(groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 5)), kernel, stride, padding,
                  dilation, groups, bias, input_size=size, batch_size=batch, activation=activation,
                  residual=residual)


MEMBERS = ("winograd(2,3)", "winograd(4,3)", "winograd(2,2)", "winograd(3,2)", "winograd(2,2)x(2,3)",
           "winograd(2,3)x(2,2)", "fft(4)", "fft(8)", "fft(4)x(2)", "strassen(1)", "strassen(2)")
SCALE = 16  # of weights: with transforms whose elements are multiples of 1/4 all numbers are whole
FLOAT32 = 1e-4  # of max |error| over the greatest output, or a few products, with other transforms
PRODUCTS = 4 * SCALE * 3**2  # a wrong one changes far more than their rounding


@lru_cache(1024)
def usable(problem: Problem, names: tuple[str, ...]) -> list[str]:
    """The algorithms, of some names, that apply to a layer."""
    found = []
    for name in names:
        try:
            found.append(named(name, problem).name)
        except LoweringError:
            continue
    return found


def algorithm(draw: Draw, problem: Problem) -> str:
    """Direct, or im2col where that is something else."""
    return str(draw(st.sampled_from(usable(problem, ("direct", "im2col")))))


def fast_algorithm(draw: Draw, problem: Problem) -> str:
    """A member of the other families; im2col or direct where none applies."""
    return str(draw(st.sampled_from(usable(problem, MEMBERS) or usable(problem, ("im2col", "direct"))[:1])))


def small_integers(program: Program, seed: int) -> dict[str, Array]:
    """An array for each input and weight."""
    rng = np.random.default_rng(seed)
    return {t.name: rng.integers(-3, 4, t.shape).astype(np.float32) * (SCALE if t.name == "w" else 1)
            for t in program.tensors if t.role in ("input", "weight")}


def names_of(program: Program) -> list[str]:
    return list(dict.fromkeys(n for stage in program.stages for n in loop_names(stage.body)))


def draw_step(draw: Draw, program: Program, kind: str, number: int) -> Step:  # noqa: C901
    """A step of a kind with arguments that are names of the program, sensible or not."""
    names = names_of(program)
    own = [n for n in names if "." not in n]

    def one(options: list[str]) -> str:
        return str(draw(st.sampled_from(options)))

    def some(options: list[str], most: int) -> tuple[str, ...]:
        return tuple(draw(st.lists(st.sampled_from(options), min_size=1, max_size=most, unique=True)))

    match kind:
        case "split":
            loop = one(names)
            tail = draw(st.sampled_from(["none", "mask", "mask", "peel", "overlap"]))
            return Split(loop, draw(st.integers(1, 5)), f"{loop}{number}o", f"{loop}{number}i", tail)
        case "reorder":
            return Reorder(some(names, len(names)))
        case "fuse":
            return Fuse(one(names), one(names), f"p{number}")
        case "fuse next":
            place = draw(st.integers(0, max(0, len(names) - 2)))
            return Fuse(names[place], names[min(place + 1, len(names) - 1)], f"p{number}")
        case "unroll":
            return Unroll(some(names, 3))
        case "vectorize":
            return Vectorize((one(names),))
        case "parallel":
            return Parallel(one(names))
        case "attach":
            return Attach(one([s.name for s in program.stages if " " not in s.name]), one(own))
        case "registers":
            return StageAt(one(["t", "t", *locals_of(program)]), one(own), "registers")
        case "inline":
            return Inline(one(["i", "i", *locals_of(program)]))
        case "buffer":
            tensor = one(["i", "i", *locals_of(program)])
            return StageAt(tensor, one(own), "buffer", draw_order(draw, program, tensor) if draw(st.booleans()) else ())
        case "stored":
            tensor = one(locals_of(program) or ["t"])
            return Layout(tensor, draw_order(draw, program, tensor))
        case "skip":
            return Skip(one(["x", "x", "x", "i"]), some(["h", "w"], 2))
        case "prefetch":
            tensors = [t.name for t in program.tensors if t.role != "constant"]
            return Prefetch(one(tensors), one(own), draw(st.integers(1, 4)))
        case "window":
            order, align = draw(st.sampled_from(ORDERS))
            return StageAt(one(["x", "x", "w", "z", "b"]), one([*own, "root"]), "window", order, align)
        case "packed" | "layout":
            tensor = one(["x", "w"])
            used = [n for stage in program.stages for around, leaf in leaves(stage.body)
                    for load in loads(leaf.value) if load.tensor == tensor
                    for n in dict.fromkeys(v for a in load.index for v in a.variables)]
            used = list(dict.fromkeys(used)) or own
            at = one([*own, "root"]) if kind == "packed" else "root"
            inside = {loop.var for stage in program.stages for around, _ in leaves(stage.body)
                      for i, loop in enumerate(around) if at in [lp.var for lp in around[:i]] or at == "root"}
            order = tuple(draw(st.permutations([n for n in used if n in inside] or used)))
            return Layout("w", order) if kind == "layout" else StageAt(tensor, at, "packed", order)
        case "peel":
            return Peel(one(names), draw(st.sampled_from(["first", "last", "last", "guarded", "guarded", "overlap"])))
    raise AssertionError(kind)


def locals_of(program: Program) -> list[str]:
    """The tensors that the program keeps for itself in memory."""
    return [t.name for t in program.tensors if t.role == "local"]


def draw_order(draw: Draw, program: Program, tensor: str) -> tuple[str, ...]:
    """The axes of a tensor in any order, one of them perhaps in blocks."""
    axes = list(program.by_name[tensor].letters) if tensor in program.by_name else ["c"]
    if draw(st.booleans()):
        axis, block = draw(st.sampled_from(axes)), draw(st.integers(2, 4))
        axes = [*(a for a in axes if a != axis), f"{axis}/{block}", f"{axis}%{block}"]
    return tuple(draw(st.permutations(axes)))


ORDERS = [((), ()), (tuple("whcn"), ()), (("n", "c/2", "h", "w", "c%2"), (("h", 4),)), (tuple("mcrs"), ())]
ANY = ["split", "split", "reorder", "reorder", "fuse", "fuse next", "unroll", "vectorize", "vectorize",
       "parallel", "parallel", "attach", "attach", "registers", "inline", "buffer", "window", "packed", "layout",
       "stored", "skip", "peel", "peel", "prefetch"]
TILED = [["skip", "fuse next", "inline"], ["split"], ["split"], ["split"], ["tile"], ["attach init"],
         ["attach epilogue"], ["registers"], ["reorder", "inline"], ["window", "packed", "inline"], ["layout"],
         ["split", "peel", "skip"], ["unroll"], ["vectorize last", "vectorize"], ["parallel"], ["peel"], ["peel"],
         ["peel"], ["stored"], ["prefetch"], ["prefetch"]]


def tile_step(draw: Draw, program: Program, kind: str, number: int) -> Step:
    """As ``draw_step``, for a schedule whose sums are inside a tile of the output."""
    first_stage = next(stage for stage in program.stages if stage.name == "init") if kind == "tile" else None
    outputs = loop_names(first_stage.body) if first_stage else []
    around = [[loop.var for loop in a] for s in program.stages for a, leaf in leaves(s.body)
              if isinstance(leaf, Reduce)]
    shared = [n for n in names_of(program) if all(n in path for path in around)] or ["m"]
    match kind:
        case "tile":
            outputs = draw(st.permutations(outputs))
            cut = draw(st.integers(1, len(outputs)))
            sums = [n for n in names_of(program) if n not in outputs]
            return Reorder((*outputs[:cut], *sums, *outputs[cut:]))
        case "attach init" | "attach epilogue" | "registers":
            first = min((i for path in around for i, n in enumerate(path) if n[0] in "crs"), default=1)
            at = around[0][max(0, first - draw(st.integers(1, 2)))] if around else "m"
            return StageAt("t", at, "registers") if kind == "registers" else Attach(kind.split()[1], at)
        case "vectorize last":
            return Vectorize((around[0][-1] if around else "f",))
        case "parallel":
            return Parallel(draw(st.sampled_from(shared)))
    return draw_step(draw, program, kind, number)


@st.composite
def schedules(draw: st.DrawFn, problem: Problem, name: str, layout: str) -> Schedule:
    """The steps, of those drawn, that are legal for an algorithm's program."""
    made = Legal(named(name, problem).lower(layout))
    tiled = any(stage.name == "init" for stage in made.program.stages) and draw(st.booleans())
    for number in range(len(TILED) if tiled else draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(TILED[number] if tiled else ANY))
        made.add((tile_step if tiled else draw_step)(draw, made.program, kind, number))
    return Schedule(tuple(made.steps))


@st.composite
def near_recipes(draw: st.DrawFn, problem: Problem, name: str, layout: str) -> Schedule:
    """The legal steps of an algorithm's recipe of any size, with a few left out and a few drawn ones between."""
    method = named(name, problem)
    recipe: Any = method.default(Machine.example(draw(st.sampled_from(["avx512", "avx2"]))), layout, 1)
    known = {field.name for field in fields(recipe)}
    drawn = {field: draw(options) for field, options in PARAMETERS.items() if field in known and draw(st.booleans())}
    made = Legal(method.lower(layout))
    often = draw(st.sampled_from([1000, 20, 8]))
    for number, step in enumerate(replace(recipe, **drawn).schedule(problem, layout).steps):
        change = draw(st.integers(0, often))
        if change == 0:
            made.add(draw_step(draw, made.program, draw(st.sampled_from(ANY)), number))
        if change != 1:
            made.add(step)
    return Schedule(tuple(made.steps))


PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "lanes": st.sampled_from([2, 4, 8, 16]), "vectors": st.integers(1, 3), "pixels": st.integers(1, 5),
    "unroll": st.integers(1, 4), "by_lines": st.booleans(), "indirect": st.booleans(), "prefetch": st.integers(0, 3),
    "pack": st.sampled_from(["none", "window", "packed"]), "tail": st.sampled_from(["peel", "overlap", "mask"]),
    "parallel": st.sampled_from(["pixels", "channels"]), "rows": st.integers(1, 3), "depth": st.integers(1, 4)}


class Legal:
    """A program and the legal steps that made it, one by one."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        """Take a step, unless it is refused."""
        try:
            after = step.apply(self.program)
            verify(after)
        except ScheduleError:
            return
        except VerifyError as error:
            if "no proof is found" not in str(error):
                raise
            return  # locals may be stored before they are read in ways that are not recognised
        self.program = after
        self.steps.append(step)


def run(program: Program, arrays: dict[str, Array]) -> Array:
    """The output; ``fuse`` makes one axis of two, of the same elements."""
    given = {name: array.reshape(program.tensor(name).shape) for name, array in arrays.items()}
    return interpret(program, given)["y"].reshape(-1)


def assert_equal(program: Program, found: Array, expected: Array) -> None:
    """Equal, up to float32 rounding where the program has constants that are not multiples of 1/4."""
    exact = all(4 * value == round(4 * value) for t in program.tensors for value in t.values or ())
    tolerance = 0.0 if exact else FLOAT32 * max(PRODUCTS, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def equals_the_unscheduled_nest(problem: Problem, name: str, layout: str, schedule: Schedule) -> None:
    """In the interpreter, as source, and as a machine would run it."""
    program = named(name, problem).lower(layout)
    scheduled = apply(program, schedule)
    assert parse_schedule(schedule.text) == schedule
    arrays = small_integers(program, 1)
    expected = run(program, arrays)
    assert_equal(program, run(scheduled, arrays), expected)
    given = {name: array.reshape(scheduled.tensor(name).shape) for name, array in arrays.items()}
    assert_equal(program, run_source(scheduled, given)["y"].reshape(-1), expected)
    assert_equal(program, run(threaded(scheduled.with_body(lanes_apart), 3), arrays), expected)


def runs_as_machine_code(problem: Problem, name: str, layout: str, schedule: Schedule) -> None:
    """What LLVM makes of it, on 1 and on 3 threads."""
    rng = np.random.default_rng(1)
    x, w, b, z = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (
        problem.input_shape, problem.weight_shape, problem.bias_shape, problem.output_shape))
    weight, bias, residual = SCALE * w, b if problem.bias else None, z if problem.residual else None
    expected = convolve(problem, x, weight, bias, residual)
    given_z = None if residual is None else to_layout(residual, layout)
    for threads in (1, 3):
        kernel = Kernel(Plan(problem, Target(host.machine(), layout, threads), named(name, problem), schedule))
        y = kernel(to_layout(x, layout), weight, bias, residual=given_z)
        assert_equal(kernel.plan.program, from_layout(y, problem.output_shape, layout), expected)


def drawn(data: st.DataObject, choose: Callable[[Draw, Problem], str], recipe: bool) -> tuple[
        Problem, str, str, Schedule]:
    """A layer, an algorithm for it, a layout and a schedule."""
    problem = data.draw(problems(), "problem")
    layout = data.draw(st.sampled_from(["nchw", "nhwc", "nchw16c"]), "layout")
    name = choose(data.draw, problem)
    steps = (near_recipes if recipe else schedules)(problem, name, layout)
    return problem, name, layout, data.draw(steps, "schedule")


CHECKS = {"nest": equals_the_unscheduled_nest, "machine code": runs_as_machine_code}
CHOICES = {"direct or im2col": algorithm, "other families": fast_algorithm}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("recipe", [False, True], ids=["any", "near a recipe"])
@settings(max_examples=settings().max_examples // 4)  # each is interpreted or compiled
@given(data=st.data())
def test_random_schedules(check: str, choose: str, recipe: bool, data: st.DataObject) -> None:
    CHECKS[check](*drawn(data, CHOICES[choose], recipe=recipe))
