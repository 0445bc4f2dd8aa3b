"""A random legal schedule of a random layer computes what the unscheduled nest computes, exactly.

Steps are drawn for the program at hand; those that raise ScheduleError are skipped, and nothing else may
raise. The result is also run as a machine would: the lanes of vector loops statement by statement and in
reverse, threads one after another from the last, each with local tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convsched.errors import ScheduleError, VerifyError
from convsched.ir import (
    Affine,
    Body,
    Load,
    Loop,
    Program,
    Reduce,
    Stage,
    leaves,
    loads,
    loop_names,
    map_leaves,
    map_value,
    substitute,
)
from convsched.ir.interp import interpret
from convsched.ir.verify import verify
from convsched.kernels.run.kernel import Kernel
from convsched.kernels.source.printer import run_source
from convsched.machine import host
from convsched.plan.families import named
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.problem import is_flat
from convsched.schedule import (
    Attach,
    Fuse,
    Inline,
    Layout,
    Parallel,
    Peel,
    Reorder,
    Schedule,
    Split,
    StageAt,
    Step,
    Unroll,
    Vectorize,
    apply,
    apply_step,
    parse_schedule,
)

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


def algorithm(draw: Draw, problem: Problem) -> str:
    """Direct, or im2col where that is something else."""
    applies = isinstance(problem, Conv2d) and not is_flat(problem)
    return str(draw(st.sampled_from(["direct", "im2col"] if applies else ["direct"])))


def small_integers(program: Program, seed: int) -> dict[str, Array]:
    """An array for each input and weight."""
    rng = np.random.default_rng(seed)
    return {t.name: rng.integers(-3, 4, t.shape).astype(np.float32)
            for t in program.tensors if t.role in ("input", "weight")}


def names_of(program: Program) -> list[str]:
    return list(dict.fromkeys(n for stage in program.stages for n in loop_names(stage.body)))


def draw_step(draw: Draw, program: Program, kind: str, number: int) -> Step:
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
            return StageAt("t", one(own), "registers")
        case "inline":
            return Inline("i")
        case "buffer":
            return StageAt("i", one(own), "buffer")
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
            return Peel(one(names), draw(st.sampled_from(["first", "last", "last", "overlap"])))
    raise AssertionError(kind)


ORDERS = [((), ()), (tuple("whcn"), ()), (("n", "c/2", "h", "w", "c%2"), (("h", 4),)), (tuple("mcrs"), ())]
ANY = ["split", "split", "reorder", "reorder", "fuse", "fuse next", "unroll", "vectorize", "vectorize",
       "parallel", "parallel", "attach", "attach", "registers", "inline", "buffer", "window", "packed", "layout",
       "peel", "peel"]
TILED = [["fuse next", "inline"], ["split"], ["split"], ["split"], ["tile"], ["attach init"], ["attach epilogue"],
         ["registers"], ["reorder", "inline"], ["window", "packed", "inline"], ["layout"], ["split", "peel"],
         ["unroll"], ["vectorize last", "vectorize"], ["parallel"], ["peel"], ["peel"], ["peel"]]


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
def schedules(draw: st.DrawFn, program: Program) -> Schedule:
    """The steps, of those drawn, that are legal."""
    tiled = draw(st.booleans())
    count = len(TILED) if tiled else draw(st.integers(1, 14))
    done: list[Step] = []
    for number in range(count):
        kind = draw(st.sampled_from(TILED[number] if tiled else ANY))
        step = (tile_step if tiled else draw_step)(draw, program, kind, number)
        try:
            after = apply_step(program, step)
            verify(after)
        except ScheduleError:
            continue
        except VerifyError as error:
            if "no proof is found" not in str(error):
                raise
            continue  # locals may be stored before they are read in ways that are not recognised
        program = after
        done.append(step)
    return Schedule(tuple(done))


def lanes_apart(body: Body) -> Body:
    """Vector loops as lanes that run statement by statement, from the last lane to the first."""
    out: list[Any] = []
    for s in body:
        if isinstance(s, Loop) and s.kind == "vector":
            mirrored = {s.var: Affine.of(s.extent - 1) - s.var}
            out += [Loop(s.var, s.extent, substitute((leaf,), mirrored)) for leaf in s.body]
        else:
            out.append(replace(s, body=lanes_apart(s.body)) if isinstance(s, Loop) else s)
    return tuple(out)


def share(body: Body, thread: int, threads: int) -> Body:
    """One thread's part of a stage."""
    out: list[Any] = []
    for s in body:
        if isinstance(s, Loop) and s.kind == "parallel":
            first, last = s.extent * thread // threads, s.extent * (thread + 1) // threads
            if last > first:
                moved = substitute(s.body, {s.var: Affine.of(s.var) + first})
                out.append(Loop(s.var, last - first, moved))
        elif isinstance(s, Loop):
            if inside := share(s.body, thread, threads):
                out.append(replace(s, body=inside))
        else:
            out.append(s)
    return tuple(out)


def with_suffix(body: Body, names: set[str], suffix: str) -> Body:
    """The body with some tensors renamed."""
    def renamed(name: str) -> str:
        return name + suffix if name in names else name
    return map_leaves(body, lambda leaf: replace(
        leaf, tensor=renamed(leaf.tensor),
        value=map_value(leaf.value, lambda load: Load(renamed(load.tensor), load.index))))


def threaded(program: Program, threads: int) -> Program:
    """Each stage with parallel loops as the shares of threads, the last thread first."""
    users: dict[str, set[str]] = {}
    for stage in program.stages:
        for _, leaf in leaves(stage.body):
            for name in (leaf.tensor, *(load.tensor for load in loads(leaf.value))):
                users.setdefault(name, set()).add(stage.name)
    private = {t.name for t in program.tensors if t.role in ("local", "register") and len(
        users.get(t.name, ())) == 1}
    stages: list[Stage] = []
    tensors = list(program.tensors)
    for stage in program.stages:
        if stage.when == "bind" or not any(
                loop.kind == "parallel" for around, _ in leaves(stage.body) for loop in around):
            stages.append(stage)
            continue
        for thread in reversed(range(threads)):
            body = with_suffix(share(stage.body, thread, threads), private, f".{thread}")
            stages.append(replace(stage, name=f"{stage.name} {thread}", body=body))
    tensors += [replace(program.tensor(n), name=f"{n}.{i}") for n in sorted(private) for i in range(threads)]
    return replace(program, tensors=tuple(tensors), stages=tuple(stages))


def run(program: Program, arrays: dict[str, Array]) -> Array:
    """The output; ``fuse`` makes one axis of two, of the same elements."""
    given = {name: array.reshape(program.tensor(name).shape) for name, array in arrays.items()}
    return interpret(program, given)["y"].reshape(-1)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_schedule_equals_the_unscheduled_nest(data: st.DataObject) -> None:
    problem = data.draw(problems(), "problem")
    layout = data.draw(st.sampled_from(["nchw", "nhwc", "nchw16c"]), "layout")
    program = named(algorithm(data.draw, problem), problem).lower(layout)
    schedule = data.draw(schedules(program), "schedule")
    scheduled = apply(program, schedule)
    assert parse_schedule(schedule.text) == schedule
    arrays = small_integers(program, 1)
    expected = run(program, arrays)
    np.testing.assert_array_equal(run(scheduled, arrays), expected)
    given = {name: array.reshape(scheduled.tensor(name).shape) for name, array in arrays.items()}
    np.testing.assert_array_equal(run_source(scheduled, given)["y"].reshape(-1), expected)
    machine = scheduled.with_body(lanes_apart)
    np.testing.assert_array_equal(run(threaded(machine, 3), arrays), expected)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_schedule_as_machine_code(data: st.DataObject) -> None:
    """What LLVM makes of it, on 1 and on 3 threads."""
    problem = data.draw(problems(), "problem")
    layout = data.draw(st.sampled_from(["nchw", "nhwc", "nchw16c"]), "layout")
    name = algorithm(data.draw, problem)
    program = named(name, problem).lower(layout)
    schedule = data.draw(schedules(program), "schedule")
    arrays = small_integers(program, 1)
    expected = run(program, arrays).reshape(problem.output_shape)
    given = [to_layout(arrays["x"].reshape(problem.input_shape), layout), arrays["w"].reshape(problem.weight_shape)]
    residual = to_layout(arrays["z"].reshape(problem.output_shape), layout) if "z" in arrays else None
    for threads in (1, 3):
        kernel = Kernel(problem, schedule, layout=layout, threads=threads, machine=host.machine(), algorithm=name)
        y = kernel(*given, arrays.get("b"), residual=residual)
        np.testing.assert_array_equal(from_layout(y, problem.output_shape, layout), expected)
