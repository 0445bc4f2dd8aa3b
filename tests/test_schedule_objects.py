"""Schedules made as objects are checked as text is, and none can hang the compiler or exhaust the memory."""

from __future__ import annotations

from dataclasses import fields as fields_of
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convsched as cs
from convsched.errors import ScheduleError
from convsched.ir import Affine, Const, Loop, Store
from convsched.ir.examples import product
from convsched.ir.simplify import prune
from convsched.kernels.source.printer import run_source
from convsched.lower.direct import lower_direct
from convsched.problem.reference import convolve
from convsched.schedule import (
    GREATEST_NUMBER,
    STEP_KINDS,
    STEPS,
    Attach,
    Fuse,
    Layout,
    Parallel,
    Peel,
    Reorder,
    Schedule,
    Split,
    StageAt,
    Unroll,
    Vectorize,
    apply,
    checks,
    parse_schedule,
)

LAYER = cs.Conv2d(4, 6, 3, padding=1, input_size=(5, 7), activation="relu")
PROGRAM = lower_direct(LAYER)


def refused(text: str, step: str, why: str, fix: str, layer: cs.Conv2d | cs.Linear = LAYER) -> ScheduleError:
    """``compile`` refuses a schedule, with the nest."""
    with pytest.raises(ScheduleError) as caught:
        cs.compile(layer, schedule=text, threads=1)
    error = caught.value
    assert (error.step, why in error.why, fix in error.fix) == (step, True, True), str(error)
    assert error.nest.startswith(layer.text)
    return error


# fields

@pytest.mark.parametrize(("kind", "fields", "step", "allowed"), [
    (Split, ("m", 16, "a", "b", "masks"), "Split(tail='masks')", "tail is one of mask, peel, overlap, or 'none'"),
    (Split, ("m", 16.0, "a", "b"), "Split(factor=16.0)", f"factor is an integer of at most {GREATEST_NUMBER}"),
    (Split, ("m", "16", "a", "b"), "Split(factor='16')", "factor is an integer"),
    (Split, ("m", True, "a", "b"), "Split(factor=True)", "factor is an integer"),
    (Split, ("m", -4, "a", "b"), "Split(factor=-4)", "not negative"),
    (Split, ("m", 10**30, "a", "b"), f"Split(factor={10**30})", f"at most {GREATEST_NUMBER}"),
    (Split, ("m", 10**5000, "a", "b"), "Split(factor=int)", f"at most {GREATEST_NUMBER}"),
    (Split, ("m 2", 4, "a", "b"), "Split(loop='m 2')", "loop is a name such as 'm0'"),
    (Split, ("m", 4, "", "b"), "Split(outer='')", "outer is a name"),
    (Split, ("m", 4, "a", "ü"), "Split(inner='ü')", "inner is a name"),
    (Reorder, ("m",), "Reorder(loops='m')", "loops is a tuple of names such as ('m0', 'c')"),
    (Reorder, (["m", "c"],), "Reorder(loops=['m', 'c'])", "loops is a tuple"),
    (Reorder, ((),), "Reorder(loops=())", "loops is a tuple"),
    (Unroll, (("m", 3),), "Unroll(loops=('m', 3))", "loops is a tuple"),
    (Vectorize, ("f",), "Vectorize(loops='f')", "loops is a tuple"),
    (Parallel, (None,), "Parallel(loop=None)", "loop is a name"),
    (Parallel, ("m; parallel n",), "Parallel(loop='m; parallel n')", "loop is a name"),
    (Fuse, ("e", "f", "p\n"), "Fuse(fused='p\\n')", "fused is a name"),
    (StageAt, ("x", "e", "cache"), "StageAt(where='cache')", "where is one of registers, buffer, window, packed"),
    (StageAt, ("x", "e", ["window"]), "StageAt(where=['window'])", "where is one of"),
    (StageAt, ("x", "e", "window", "nchw"), "StageAt(order='nchw')", "order is a tuple"),
    (StageAt, ("x", "e", "window", (), {"h": 16}), "StageAt(align={'h': 16})", "align is a tuple of pairs"),
    (StageAt, ("x", "e", "window", (), (("h", 1), ("h", 2))), "StageAt(align=(('h', 1), ('h', 2)))",
     "each entry once"),
    (StageAt, ("x", "e", "window", (), (("h", 2**31),)), f"StageAt(align=(('h', {2**31}),))",
     f"at most {GREATEST_NUMBER}"),
    (StageAt, ("x", "e", "window", (), (("a,b", 2),)), "StageAt(align=(('a,b', 2),))", "align is a tuple"),
    (Layout, ("w", ()), "Layout(order=())", "order is a tuple"),
    (Layout, ("w", ("m-16",)), "Layout(order=('m-16',))", "order is a tuple"),
    (Attach, ("pack w", "e"), "Attach(stage='pack w')", "stage is a name"),
    (Peel, ("m", "middle"), "Peel(which='middle')", "which is one of first, last, guarded, overlap"),
])
def test_a_field_that_no_text_says(kind: Any, fields: tuple[object, ...], step: str, allowed: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        kind(*fields)
    assert (caught.value.step, caught.value.why) == (step, "is not a step")
    assert allowed in caught.value.fix


@pytest.mark.parametrize(("steps", "shown", "fix"), [
    ("unroll m", "Schedule('unroll m')", "parse_schedule takes a text"),
    (Peel("m"), "Schedule(Peel(loop='m', which='last'))", "give a tuple of steps"),
    ([Peel("m")], "Schedule([Peel(loop='m', which='last')])", "give a tuple of steps"),
    (("unroll m",), "'unroll m'", "use one of Split, Reorder"),
    ((3,), "3", "use one of Split, Reorder"),
])
def test_a_schedule_is_a_tuple_of_steps(steps: Any, shown: str, fix: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule(steps)
    assert caught.value.step == shown
    assert fix in caught.value.fix


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
                   st.sampled_from(["m", "c/16", "none", "mask", "window", "first", ("m",), ("c/2", "h"), (("h", 4),)]),
                   st.lists(st.text(max_size=3), max_size=2).map(tuple))


@given(st.sampled_from(STEP_KINDS), st.data())
def test_what_can_be_made_has_a_text(kind: Any, data: st.DataObject) -> None:
    fields = {field.name: data.draw(VALUES, field.name) for field in fields_of(kind)}
    try:
        step = kind(**fields)
    except ScheduleError:
        return
    assert parse_schedule(str(step)).steps == (step,)


@pytest.mark.parametrize("text", [
    f"split m {'9' * 5000} -> a b", "split m ٣ -> a b", "split é 2 -> a b", "stage x at e window align=a,b:3",
    f"stage x at e window align=h:{'9' * 5000}", "split m 2147483648 -> a b",
])
def test_text_with_strange_numbers_and_names(text: str) -> None:
    with pytest.raises(ScheduleError, match="is not a step"):
        parse_schedule(text)


# sizes

@pytest.mark.parametrize(("text", "elements"), [
    ("stage x at e window n c h w align=w:2147483647", 107 * 2147483647),
    ("stage x at root window n c h w align=c:2147483647", 3 * 2147483647),
    ("stage x at e window n c/999999999 h w c%999999999", 999999999),
])
def test_a_buffer_is_not_mostly_gaps(text: str, elements: int) -> None:
    error = refused(text, text, "that are used", f"at most {checks.ALLOWANCE} elements")
    assert int(error.why.split()[4]) >= elements


def test_a_packed_buffer_of_padded_loops_is_bounded() -> None:
    padded = "; ".join(f"split {v} 4096 -> {v}0 {v}1 tail=mask" for v in "mcrs")
    refused(f"{padded}; layout w m0 c0 r0 s0 m1 c1 r1 s1", "layout w m0 c0 r0 s0 m1 c1 r1 s1",
            f"would have {4096**4} elements for {6 * 4 * 3 * 3}", "at most")


def test_a_block_of_too_many_digits_is_none() -> None:
    block = "9" * 5000
    text = f"stage x at e window n c/{block} h w c%{block}"
    refused(text, text, "does not name the axes n c h w", "as c or as c/16 and c%16")


def test_wide_alignment_of_a_stride_is_allowed() -> None:
    scheduled = apply(PROGRAM, parse_schedule("stage x at e window n c h w align=h:1024"))
    assert [stored.stride for stored in scheduled.tensor("x_at_e").storage] == [4 * 3072, 3072, 1024, 1]


def test_split_factors_are_bounded_by_the_extent() -> None:
    big = product(5000, 2)
    assert apply(big, parse_schedule("split m 5000 -> a b"))
    for program, most in ((PROGRAM, 4096), (big, 10000)):
        assert apply(program, parse_schedule(f"split m {most} -> a b tail=mask"))
        with pytest.raises(ScheduleError, match=f"the factor is {most + 1}; use one of at most {most}"):
            apply(program, parse_schedule(f"split m {most + 1} -> a b tail=mask"))


def test_unrolled_statements_are_counted() -> None:
    layer = cs.Linear(4, 2_000_000, bias=False)
    refused("unroll m", "unroll m", f"{3 * 2_000_000} statements", f"at most {checks.STATEMENTS}", layer)
    layer = cs.Linear(4, 120 * 120, bias=False)  # init and epilogue write out 14400 statements each, conv 57600
    error = refused("split m 120 -> m0 m1; unroll m0 m1 c", "unroll m0 m1 c", f"{6 * 120 * 120} statements",
                    "fewer or shorter", layer)
    assert "unroll m0 < 120, m1 < 120, c < 4: <--" in error.nest


def test_statements_that_never_run_are_not_counted() -> None:
    padded = "; ".join(f"split {v} 4096 -> {v}0 {v}1 tail=mask" for v in "cef")
    scheduled = apply(PROGRAM, parse_schedule(f"{padded}; unroll c1 e1 f1"))
    assert checks.bounded(PROGRAM, scheduled) == scheduled


def test_vector_loops_and_registers_are_bounded() -> None:
    layer = cs.Linear(4, 100_000, bias=False)
    refused("reorder n c m; vectorize m", "vectorize m", "m has 100000 iterations", f"at most {checks.LANES}", layer)
    refused("attach init at n; attach epilogue at n; stage t at n registers", "stage t in registers",
            "would have 100000 elements", f"at most {checks.REGISTERS}", layer)


def test_ragged_splits_do_not_multiply_what_runs() -> None:
    steps = [f"split {'f' if n == 70 else f'f{n}'} {n - 1} -> o{n} f{n - 1} tail=mask" for n in range(70, 58, -1)]
    layer = cs.Conv2d(1, 1, 1, input_size=(9, 70), bias=False)
    refused("; ".join(steps), "schedule", "would run where the nest without it runs 1890", "256 times", layer)


def test_loops_copies_and_steps_are_bounded() -> None:
    splits = "; ".join(f"split m{i or ''} 1 -> m{i + 1} k{i}" for i in range(40))
    deepest = splits.split("; split m13 ")[0]
    ones = {t.name: np.ones(t.shape, np.float32) for t in PROGRAM.tensors if t.role in ("input", "weight")}
    run_source(apply(PROGRAM, parse_schedule(deepest)), ones)  # as deep as Python nests loops
    refused(splits, "split m13 1 -> m14 k13", "21 loops", f"at most {checks.DEPTH}")
    peels = "; ".join(f"peel {loop} first; peel {loop}" for loop in "nmcefrs")
    refused(peels, "peel s first", "statements", f"at most {checks.COPIES}")
    refused("; ".join(["unroll m"] * (STEPS + 1)), "schedule", f"has {STEPS + 1} steps", f"at most {STEPS}")


def test_dead_iterations_are_found_at_once() -> None:
    """As many as an int holds; the last guard wants them late, the one before it early."""
    v = Affine.of("v")
    leaf = Store("y", (Affine(),), Const(0.0), (v * 3 - 10, v * -2 + 3))
    loop, = prune((Loop("v", 2**62, (leaf,)),), {})
    assert isinstance(loop, Loop)
    assert loop.extent == 4  # 3 v < 10


# buffers and packing

@pytest.mark.parametrize(("text", "step", "why", "fix"), [
    ("layout w m c r s; split w.m 4 -> a b tail=mask", "split w.m 4 -> a b tail=mask", "cut short by a guard",
     "into equal parts"),
    ("layout w m c r s; peel w.m", "peel w.m last", "more than a copy", "a single copy"),
])
def test_packing_that_is_no_copy(text: str, step: str, why: str, fix: str) -> None:
    error = refused(text, step, why, fix)
    assert error.why.startswith("stage 'pack w' runs when weights are bound and would ")


def test_a_tensor_is_staged_once_even_if_its_loops_are_renamed() -> None:
    renamed = "; ".join(f"split x.{axis} 1 -> {axis}a {axis}b" for axis in "nchw")
    refused(f"stage x at root window; {renamed}; stage x at root window", "stage x at root window",
            "x is staged already", "once")


@pytest.mark.parametrize("text", [
    "split m 2 -> for in; parallel for", "split m 2 -> x y; split e 5 -> thread threads", "unroll m m m",
    "peel m; " * 9, "layout w s r c m; unroll w.s; split w.m 3 -> a b; reorder b w.c",
    "; ".join(["unroll m"] * STEPS), "stage x at root window n c h w align=n:2147483647",
    "stage w at e window m/4 c r s m%4", "stage w at root window m/4 c r s m%4",
    "stage w at root window c m/4 r s m%4; split w.m 3 -> a b; reorder b w.c a",
    "; ".join(f"split {v} 4096 -> {v}0 {v}1 tail=mask" for v in "mef"),
])
def test_odd_schedules_that_are_right(text: str) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.integers(-3, 4, shape).astype(np.float32)
                       for shape in (LAYER.input_shape, LAYER.weight_shape, LAYER.bias_shape))
    kernel = cs.compile(LAYER, schedule=text, threads=2)
    np.testing.assert_array_equal(kernel(x, weight, bias), convolve(LAYER, x, weight, bias))
