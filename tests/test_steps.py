"""The steps that change loops: what each does, and every way in which each refuses."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace

import numpy as np
import pytest

from convsched.errors import ScheduleError
from convsched.ir import Affine, Load, Program, Stage, Store, find_loops
from convsched.ir.examples import at, filtered, nest, nests, product, scaled, unfolded
from convsched.ir.interp import interpret
from convsched.ir.simplify import simplify
from convsched.kernels.source.printer import run_source
from convsched.lower.direct import lower_direct
from convsched.lower.im2col import lower_im2col
from convsched.problem import Conv2d, Linear
from convsched.schedule import Inline, Schedule, Split, apply, parse_schedule

LAYER = lower_direct(Conv2d(4, 6, 3, padding=1, input_size=(5, 7), activation="relu"))
GROUPED = lower_direct(Conv2d(4, 6, 1, groups=2, input_size=(5, 7), batch_size=2))
RESIDUAL = lower_direct(Conv2d(4, 6, 1, input_size=(5, 7), residual=True))
INNER = "attach init at f; attach epilogue at f"


def after(program: Program, text: str) -> Program:
    """The program after some steps, not simplified."""
    for step in parse_schedule(text).steps:
        program = step.apply(program)
    return program


def shown(program: Program, text: str) -> str:
    return nests(after(program, text))


def extents(program: Program, loop: str) -> list[int]:
    return [found.extent for stage in program.stages for found in find_loops(stage.body, loop)]


def refused(program: Program, text: str, step: str, why: str, fix: str, marked: str | None) -> None:
    """The last step is refused: the message has its parts, and the nest with the loop marked."""
    with pytest.raises(ScheduleError) as caught:
        apply(program, parse_schedule(f"{text}; {step}"))
    error = caught.value
    assert (error.step, why in error.why, fix in error.fix) == (
        step, True, True), f"{error.step}: {error.why}; {error.fix}"
    assert str(error) == f"{error.step}: {error.why}; {error.fix}\n{error.nest}"
    assert error.nest.startswith(program.name)
    arrows = [line for line in error.nest.splitlines() if line.endswith(" <--")]
    if marked is None:
        assert not arrows
    else:
        assert arrows
        assert all(f" {marked} < " in line for line in arrows)


@pytest.mark.parametrize("module", ["ir.examples", "schedule.attach", "schedule.checks", "schedule.fuse",
                                    "schedule.inline", "schedule.layout", "schedule.legality", "schedule.parallel",
                                    "schedule.peel", "schedule.prefetch", "schedule.reorder", "schedule.schedule",
                                    "schedule.skip", "schedule.split", "schedule.stage", "schedule.unroll",
                                    "schedule.vectorize"])
def test_rewrites_in_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"convsched.{module}"), optionflags=doctest.REPORT_UDIFF)
    assert found.failed == 0
    assert found.attempted > 0 or module == "schedule.checks"


# split

def test_split_cuts_every_loop_of_the_name() -> None:
    done = after(LAYER, "split m 3 -> m0 m1")
    assert extents(done, "m0") == [2, 2, 2]
    assert extents(done, "m1") == [3, 3, 3]
    assert not extents(done, "m")


def test_split_of_a_parallel_loop_is_parallel_outside_only() -> None:
    assert "parallel m0 < 2: for m1 < 4:" in shown(product(8, 4), "parallel m; split m 4 -> m0 m1")


def test_split_of_an_unrolled_loop_is_unrolled() -> None:
    assert "unroll m0 < 2, m1 < 4:" in shown(product(8, 4), "unroll m; split m 4 -> m0 m1")


def test_split_by_more_than_the_extent() -> None:
    assert extents(apply(product(5, 2), parse_schedule("split m 8 -> m0 m1 tail=peel")), "m1") == [5]
    assert extents(apply(product(5, 2), parse_schedule("split m 8 -> m0 m1 tail=mask")), "m1") == [5]


def test_split_overlap_leaves_whole_copies_alone() -> None:
    text = f"{INNER}; peel f first; split f 3 -> f0 f1 tail=mask; split e 2 -> e0 e1 tail=overlap"
    assert extents(after(LAYER, text), "e0") == [2]


@pytest.mark.parametrize(("before", "step", "why", "fix", "marked"), [
    ("", "split q 2 -> q0 q1", "there is no loop q", "use one of n, m, e, f, c, r, s", None),
    ("", "split m 4 -> m0 m1", "6 is not a multiple of 4", "tail=overlap, or one of 1, 2, 3, 6", "m"),
    ("", "split m 0 -> m0 m1", "the factor is 0", "positive", "m"),
    ("", "split m 2 -> e m1", "a loop e exists already", "another name", "e"),
    ("", "split m 2 -> m0 m0", "m0 is named twice", "two names", None),
    ("", "split m 2 -> root m1", "root is where stage copies once", "another name", None),
    ("reorder n e m c r s f; vectorize f", "split f 7 -> f0 f1", "f is a vector loop",
     "split first, then vectorize", "f"),
])
def test_split_refuses(before: str, step: str, why: str, fix: str, marked: str | None) -> None:
    refused(LAYER, before, step, why, fix, marked)


@pytest.mark.parametrize(("before", "step", "why", "fix"), [
    ("", "split c 3 -> c0 c1 tail=overlap", "t would be summed twice", "use peel"),
    (f"{INNER}; parallel f", "split f 2 -> c0 c1 tail=overlap", "threads that share out c0 would meet in y",
     "all uses of it are inside"),
    (INNER, "split f 9 -> c0 c1 tail=overlap", "c0 has no full iteration", "smaller"),
])
def test_split_with_overlap_refuses(before: str, step: str, why: str, fix: str) -> None:
    """The error is that of the peel which makes the tail, with the loop marked that the split made."""
    with pytest.raises(ScheduleError) as caught:
        apply(LAYER, parse_schedule(f"{before}; {step}"))
    error = caught.value
    assert (error.step, why in error.why, fix in error.fix) == ("peel c0 overlap", True, True)
    assert any("c0 <" in line for line in error.nest.splitlines() if line.endswith(" <--"))


def test_split_to_a_name_that_is_none() -> None:
    with pytest.raises(ScheduleError, match=r"outer='m 0'.*: is not a step; outer is a name"):
        Split("m", 2, "m 0", "m1")


# reorder

def test_reorder_permutes_within_the_slots_of_its_loops() -> None:
    assert "for n < 1: for f < 7: for e < 5: for m < 6: for c < 4:" in shown(LAYER, "reorder f m")


def test_reorder_of_loops_that_only_some_stages_have() -> None:
    text = shown(LAYER, "reorder c e m f")
    assert "for n < 1: for c < 4: for e < 5: for m < 6: for f < 7:" in text
    assert "for n < 1: for e < 5: for m < 6: for f < 7:\n    t[" in text


def test_reorder_across_a_masked_group() -> None:
    text = shown(GROUPED, "split m 2 -> m0 m1 tail=mask; reorder m0 e f m1 g")
    assert "for m0 < 2: for e < 5: for f < 7: for m1 < 2: for g < 2: for c < 2:" in text


@pytest.mark.parametrize(("before", "step", "why", "fix", "marked"), [
    ("", "reorder m q", "there is no loop q", "use one of", None),
    ("", "reorder m e m", "m is named twice", "once", "m"),
    ("attach init at e", "reorder f m", "m and f are not perfectly nested", "before other statements", "m"),
    ("attach epilogue at m", "reorder c m", "m and c are not perfectly nested", "reorder before", "m"),
    ("reorder n e f c r s m; vectorize m", "reorder m f", "f would be inside the vector loop m",
     "vectorize last", "m"),
])
def test_reorder_refuses(before: str, step: str, why: str, fix: str, marked: str | None) -> None:
    refused(LAYER, before, step, why, fix, marked)


def test_reorder_refuses_loops_that_depend() -> None:
    text = "reorder n e m f; attach init at e; attach epilogue at e; stage t at e registers"
    refused(LAYER, text, "reorder e n", "depend on each other through t", "leave that loop where it is", "e")


# inline

UNFOLDED = unfolded(4, 3)
TOEPLITZ = lower_im2col(Conv2d(4, 6, 3, padding=1, input_size=(5, 7)))


def test_inline_needs_no_digits_where_loops_give_them() -> None:
    text = shown(UNFOLDED, "split p 3 -> p0 p1; inline i")
    assert "for p0 < 4: for p1 < 3:\n    y[3 p0 + p1] = x[2 p0, p1] * w" in text


def test_inline_of_a_block_has_digits_within_the_block() -> None:
    text = shown(TOEPLITZ, "split p 7 -> p0 p1; split p1 4 -> p2 p3 tail=peel; inline i")
    assert "x[0, c, p0 + r - 1, p3 + s - 1]" in text
    assert "with" not in text
    text = shown(TOEPLITZ, "split p 35 -> e0 p1; split p1 4 -> p2 p3 tail=peel; split e 5 -> e0 e1; inline i")
    assert "for p3 < 4: with e1 < 5 = (4 p2 + p3) / 7: with f < 7 = 4 p2 + p3: for c < 4:" in text
    assert "x[0, c, e1 + r - 1, f + s - 1]" in text


def test_peel_after_inline_resolves_digits() -> None:
    done = apply(UNFOLDED, parse_schedule("inline i; split p 5 -> p0 p1 tail=peel; unroll p1"))
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    arrays = {"x": x, "w": np.array(2, np.float32)}
    wanted = 2 * x[::2].ravel()
    np.testing.assert_array_equal(interpret(done, arrays)["y"], wanted)
    np.testing.assert_array_equal(run_source(done, arrays)["y"], wanted)


@pytest.mark.parametrize(("program", "before", "step", "why", "fix", "marked"), [
    (UNFOLDED, "", "inline q", "there is no tensor q", "a single stage fills, of i", None),
    (UNFOLDED, "", "inline y", "y is a tensor of role output", "name a local tensor", None),
    (LAYER, "", "inline t", "and 2 stages fill it", "a single stage", None),
    (UNFOLDED, "split e 3 -> e0 e1 tail=mask", "inline i", "more than store each element of i once", "before", None),
    (UNFOLDED, "vectorize p", "inline i", "lanes of p would not be a fixed distance apart", "another loop", "p"),
    (UNFOLDED, "inline i", "unroll e", "e is a digit of other loops", "inline later", "e"),
    (TOEPLITZ, "inline i", "reorder c p", "e would be outside p, of which it is a digit", "in order", "e"),
])
def test_inline_refuses(program: Program, before: str, step: str, why: str, fix: str, marked: str | None) -> None:
    refused(program, before, step, why, fix, marked)


def test_registers_after_inline() -> None:
    text = "reorder n p m c r s; attach init at m; attach epilogue at m; inline i; stage t at m registers"
    done = apply(TOEPLITZ, parse_schedule(text))
    assert done.tensor("t").role == "register"


def test_inline_needs_a_stage_that_walks_each_element_once() -> None:
    """A loop that is in no index or in two, and a tensor that is read before it is filled."""
    stages = {stage.name: stage for stage in UNFOLDED.stages}
    store = Store("i", at("e"), Load("x", at("e", "f")))
    twice = replace(UNFOLDED, stages=(Stage("i", nest({"e": 12, "f": 3}, store)), stages["conv"]))
    early = replace(UNFOLDED, stages=(stages["conv"], stages["i"]))
    for program, why in ((twice, "not the digits of the index of i"), (early, "no stage after i reads i")):
        with pytest.raises(ScheduleError, match=why):
            Inline("i").apply(program)


def test_overlap_refuses_digits() -> None:
    refused(UNFOLDED, "inline i; split p 5 -> p0 p1 tail=mask", "peel p0 overlap", "e is a digit of p0", "use peel",
            "p0")


# fuse

def test_fuse_merges_the_axes_of_all_tensors() -> None:
    done = after(RESIDUAL, "fuse e f -> p")
    assert done.tensor("x").shape == (1, 4, 35)
    assert done.tensor("z").letters == ("n", "c", "h")
    assert extents(done, "p") == [35, 35, 35]


def test_fuse_in_the_blocked_layout() -> None:
    blocked = lower_direct(Conv2d(32, 6, 1, input_size=(5, 7)), "nchw16c")
    assert after(blocked, "fuse e f -> p").tensor("x").order == ("n", "c/16", "h", "c%16")


@pytest.mark.parametrize(("program", "before", "step", "why", "fix", "marked"), [
    (RESIDUAL, "", "fuse e q -> p", "there is no loop q", "use one of", None),
    (RESIDUAL, "", "fuse e e -> p", "e is named twice", "two loops", "e"),
    (RESIDUAL, "", "fuse e f -> m", "a loop m exists already", "another name", "m"),
    (LAYER, "", "fuse e f -> p", "x is not indexed by both over whole adjacent axes", "1x1", "e"),
    (RESIDUAL, "", "fuse f e -> p", "is not indexed by both over whole", "1x1", "f"),
    (RESIDUAL, "", "fuse f c -> p", "stage init has f without c", "together", "f"),
    (RESIDUAL, "reorder e m f", "fuse e f -> p", "f is not directly inside e", "reorder first", "e"),
    (RESIDUAL, "unroll f", "fuse e f -> p", "f is not serial any more", "fuse first", "f"),
    (RESIDUAL, "split m 4 -> m0 m1 tail=mask", "fuse m0 m1 -> p", "a guard depends on one of them",
     "before splitting", "m0"),
    (lower_direct(Linear(3, 5, batch_size=2)), "", "fuse n m -> p", "is not indexed by both", "1x1", "n"),
    (lower_direct(Conv2d(4, 6, 1, input_size=(5, 7)), "nhwc"), "", "fuse n m -> p", "not indexed by both",
     "1x1", "n"),
])
def test_fuse_refuses(program: Program, before: str, step: str, why: str, fix: str,
                      marked: str | None) -> None:
    refused(program, before, step, why, fix, marked)


def test_fuse_refuses_axes_stored_apart() -> None:
    program = scaled(8, 7, 9)
    tensor = program.tensor("y")
    apart = program.with_tensor(replace(tensor, storage=tuple(reversed(tensor.storage))))
    refused(apart, "", "fuse e f -> p", "y is stored as w h m", "adjacent", "e")


# unroll, vectorize, parallel

def test_kinds() -> None:
    text = shown(LAYER, "reorder n e f c r s m; unroll r s; vectorize m; parallel e")
    assert "for n < 1: parallel e < 5: for f < 7: for c < 4:\n    unroll r < 3, s < 3: vector m < 6:" in text


def test_parallel_over_tiles_that_keep_a_buffer_of_their_own() -> None:
    text = shown(LAYER, "attach init at e; attach epilogue at e; stage x at e window; parallel e")
    assert "parallel e < 5:" in text


def test_parallel_in_a_serial_loop_that_sums() -> None:
    assert "for c < 4: parallel m < 8:" in shown(product(8, 4), "reorder c m; parallel m")


def test_vector_of_one_group_each() -> None:
    assert "vector g < 2" in shown(GROUPED, "reorder n e f c m g; vectorize g")


@pytest.mark.parametrize(("before", "step", "why", "fix", "marked"), [
    ("", "unroll q", "there is no loop q", "use one of", None),
    ("", "vectorize m", "m is not innermost", "reorder it to the end", "m"),
    ("reorder e f n m", "vectorize s", "iterations of s depend on each other through t",
     "a loop of the output", "s"),
    ("", "parallel c", "iterations of c depend on each other through t", "a loop of the output", "c"),
    ("parallel m", "parallel e", "e would be parallel inside the parallel loop m", "one of them", "e"),
    ("stage x at e window", "parallel x.w", "threads that share out x.w would meet in x_at_e",
     "all uses of it are inside", "x.w"),
])
def test_kinds_refuse(before: str, step: str, why: str, fix: str, marked: str | None) -> None:
    refused(LAYER, before, step, why, fix, marked)


# attach

def test_attach_keeps_the_order_of_stages() -> None:
    done = after(LAYER, "attach epilogue at e; attach init at e")
    assert [stage.name for stage in done.stages] == ["conv"]
    body = find_loops(done.stages[0].body, "e")[0].body
    assert len(body) == 3


@pytest.mark.parametrize(("before", "step", "why", "fix", "marked"), [
    ("", "attach init at q", "there is no loop q", "use one of", None),
    ("", "attach start at m", "there is no stage start", "use one of init, conv, epilogue", "m"),
    ("", "attach init at c", "stage init has no loop c", "an outer loop that both have", "c"),
    ("", "attach conv at c", "no stage beside conv has the loop c", "another loop", "c"),
    ("reorder c n m e f; split n 1 -> n0 n1", "attach init at f", "init has serial n0 < 1 where conv has "
     "serial c < 4", "the same outer loops", "f"),
    ("attach epilogue at e; peel m first", "attach init at e", "the loops above e are not perfectly nested",
     "attach earlier", "e"),
    ("layout w m c r s; reorder m n e f", "attach init at w.m", "stage init has no loop w.m",
     "outer loop that both", "w.m"),
])
def test_attach_refuses(before: str, step: str, why: str, fix: str, marked: str | None) -> None:
    refused(LAYER, before, step, why, fix, marked)


def test_attach_refuses_what_comes_too_early() -> None:
    shifted = filtered(8, 3)
    reader = Store("y", at("f"), Load("t", (Affine.of(7) - "f",)))
    program = replace(shifted, stages=(*shifted.stages[:2], replace(shifted.stages[2],
                                                                   body=nest({"f": 8}, reader))))
    refused(program, "", "attach epilogue at f", "iterations of f depend on each other through t",
            "outside the loops that sum", "f")


def test_attach_refuses_stages_of_other_times() -> None:
    base = filtered(8, 3)
    program = replace(base, stages=(replace(base.stages[0], when="bind"), *base.stages[1:]))
    refused(program, "", "attach init at f", "init and conv run at different times", "leave the step out", "f")


# peel and simplify

def test_peel_first_shifts_the_rest() -> None:
    text = shown(product(8, 4), "peel m first")
    assert "y[0] += x[c] * w[0, c]" in text
    assert "for m < 7: for c < 4:\n    y[m + 1] += x[c] * w[m + 1, c]" in text


def test_peel_of_one_iteration_is_nothing() -> None:
    assert shown(LAYER, "peel n") == nests(LAYER)


def test_peel_of_a_parallel_loop_is_run_by_one_thread() -> None:
    text = shown(product(8, 4), "parallel m; peel m")
    assert "parallel m < 7:" in text
    assert "parallel m < 1: for c < 4:\n    y[7]" in text


def test_peel_of_an_outermost_loop_gives_the_copy_registers_of_its_own() -> None:
    linear = lower_direct(Linear(3, 4, batch_size=5))
    done = apply(linear, parse_schedule(
        "split n 2 -> n0 n1 tail=mask; reorder n0 m c n1; attach init at m; attach epilogue at m; "
        "stage t at m registers; peel n0"))
    assert [t.name for t in done.tensors if t.role == "register"] == ["t", "t_1"]


def test_simplify_drops_iterations_that_do_nothing() -> None:
    padded = after(product(6, 2), "split m 8 -> m0 m1 tail=mask; split m1 2 -> m2 m3")
    assert extents(simplify(padded), "m2") == [3]


@pytest.mark.parametrize(("before", "step", "why", "fix", "marked"), [
    ("", "peel q last", "there is no loop q", "use one of", None),
    ("", "peel m overlap", "no iteration of m is cut short", "tail=mask first", "m"),
    (f"{INNER}; split m 4 -> m0 m1 tail=mask; split m0 3 -> m2 m3 tail=mask", "peel m2 overlap",
     "2 guards depend on m2", "use peel", "m2"),
    (f"{INNER}; split m 5 -> m0 m1 tail=mask; split m1 3 -> m2 m3 tail=mask", "peel m2 overlap",
     "2 guards depend on m2", "use peel", "m2"),
    (f"{INNER}; split m 4 -> m0 m1 tail=mask; split m1 2 -> m2 m3", "peel m2 overlap",
     "is not cut by m2 alone", "use peel", "m2"),
    ("split c 3 -> c0 c1 tail=mask", "peel c0 overlap", "t would be summed twice", "use peel", "c0"),
    (f"{INNER}; split m 4 -> m0 m1 tail=mask; layout w m0 c r s m1", "peel m0 overlap",
     "an index of w_packed cannot move by 2 of 4", "use peel", "m0"),
    (f"{INNER}; split m 7 -> m0 m1 tail=mask", "peel m0 overlap", "m0 has no full iteration to move into",
     "use mask or a smaller factor", "m0"),
])
def test_peel_refuses(before: str, step: str, why: str, fix: str, marked: str | None) -> None:
    refused(LAYER, before, step, why, fix, marked)


def test_overlap_refuses_to_read_a_residual_after_it_is_overwritten() -> None:
    refused(RESIDUAL, f"{INNER}; split f 4 -> f0 f1 tail=mask", "peel f0 overlap",
            "z may share memory with the output", "use peel", "f0")


def test_apply_without_steps_simplifies_only() -> None:
    assert apply(LAYER, Schedule()) == LAYER
