"""The steps that place data: what each does, and every way in which each refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from convsched.errors import ScheduleError
from convsched.ir import Loop, Program, Stage, leaves
from convsched.ir.examples import filtered, nests, product
from convsched.ir.interp import interpret
from convsched.lower.direct import lower_direct
from convsched.problem import Conv2d
from convsched.schedule import Layout, StageAt, apply, parse_schedule

LAYER = lower_direct(Conv2d(4, 6, 3, padding=1, input_size=(5, 7), activation="relu"))
INNER = "attach init at e; attach epilogue at e"


def after(program: Program, text: str) -> Program:
    """The program after some steps, not simplified."""
    for step in parse_schedule(text).steps:
        program = step.apply(program)
    return program


def outputs(program: Program) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(3)
    arrays = {t.name: rng.integers(-3, 4, t.shape).astype(np.float32)
              for t in program.tensors if t.role in ("input", "weight")}
    return interpret(program, arrays)["y"]


def refused(program: Program, text: str, step: str, why: str, fix: str, marked: str | None) -> None:
    """The last step is refused: the message has its parts, and the nest with the loop marked."""
    with pytest.raises(ScheduleError) as caught:
        apply(program, parse_schedule(f"{text}; {step}"))
    error = caught.value
    assert why in error.why, error.why
    assert fix in error.fix, error.fix
    assert error.step == step
    assert error.nest.startswith(program.name)
    arrows = [line for line in error.nest.splitlines() if line.endswith(" <--")]
    assert bool(arrows) == (marked is not None)
    assert all(f" {marked} < " in line for line in arrows)


# registers

def test_registers_keep_the_axes_of_the_tile() -> None:
    done = after(LAYER, f"reorder n e m f; {INNER}; stage t at e registers")
    assert done.tensor("t").role == "register"
    assert done.tensor("t").shape == (6, 7)
    assert done.tensor("t").letters == ("c", "w")


def test_registers_of_a_peeled_tile_keep_its_parts_apart() -> None:
    done = apply(LAYER, parse_schedule(
        f"split f 4 -> f0 f1 tail=peel; reorder n e m; {INNER}; stage t at e registers"))
    assert done.tensor("t").shape == (6, 7)
    np.testing.assert_array_equal(outputs(done), outputs(LAYER))


def test_registers_of_one_element() -> None:
    done = after(LAYER, "attach init at f; attach epilogue at f; stage t at f registers")
    assert done.tensor("t").shape == (1,)


@pytest.mark.parametrize(("before", "step", "why", "fix", "marked"), [
    ("", "stage q at e registers", "there is no tensor q", "use one of x, w, y", "e"),
    ("", "stage t at q registers", "there is no loop q", "use one of", None),
    ("", "stage x at e registers", "x is a tensor of role input", "only local tensors", "e"),
    ("", "stage t at root registers", "the tile of one loop", "name the loop", None),
    (INNER, "stage t at e registers n c", "no order in memory", "leave the order", "e"),
    (INNER, "stage t at e registers align=n:2", "no order in memory", "leave the order", "e"),
    ("", "stage t at e registers", "t is also used outside one loop e, in init, conv, epilogue",
     "attach the other stages", "e"),
    (f"{INNER}; stage t at e registers", "stage t at e registers", "t is a tensor of role register",
     "only local", "e"),
])
def test_registers_refuse(before: str, step: str, why: str, fix: str, marked: str | None) -> None:
    refused(LAYER, before, step, why, fix, marked)


def test_registers_refuse_a_sum_that_goes_on() -> None:
    base = filtered(8, 3)
    alone = replace(base, stages=(base.stages[1],))
    refused(alone, "reorder s f", "stage t at f registers", "t is not set inside f before it is used",
            "attach the stage that sets it", "f")


def test_registers_refuse_a_tile_that_several_iterations_share() -> None:
    text = "reorder n e f m; attach init at f; attach epilogue at f"
    program = after(LAYER, text)
    again = replace(program, stages=(Stage("conv", (Loop("k", 2, program.stages[0].body),)),))
    refused(again, "", "stage t at f registers", "iterations of k depend on each other through t",
            "loops of the output only", "f")


def test_registers_refuse_two_nests() -> None:
    program = after(LAYER, INNER)
    twice = replace(program, stages=(replace(program.stages[0], body=program.stages[0].body * 2),))
    refused(twice, "", "stage t at e registers", "registers of two loop nests", "stage before peel", "e")


# window and packed

def test_window_has_the_border_as_zeros() -> None:
    done = after(LAYER, "stage x at e window n h w c align=h:16")
    buffer = done.tensor("x_at_e")
    assert (buffer.shape, buffer.order) == ((1, 4, 3, 9), ("n", "h", "w", "c"))
    assert [s.stride for s in buffer.storage] == [3 * 48, 48, 4, 1]
    assert not buffer.border
    np.testing.assert_array_equal(outputs(done), outputs(LAYER))


def test_window_in_blocks() -> None:
    done = after(LAYER, "stage x at e window c/2 n h w c%2")
    assert done.tensor("x_at_e").order == ("c/2", "n", "h", "w", "c%2")


def test_window_at_root_is_a_stage_of_its_own() -> None:
    done = after(LAYER, "stage x at root window")
    assert [(s.name, s.when) for s in done.stages][1] == ("pack x", "run")
    np.testing.assert_array_equal(outputs(done), outputs(LAYER))


def test_window_stays_inside_where_a_tile_is_ragged() -> None:
    done = after(LAYER, "split e 2 -> e0 e1 tail=mask; reorder n e0; stage x at e0 window")
    assert "if 2 e0 + x.h < 7: x_at_e0[" in nests(done)
    np.testing.assert_array_equal(outputs(done), outputs(LAYER))


def test_window_only_where_it_is_used() -> None:
    text = nests(after(LAYER, "stage x at e window"))
    assert text.count("x_at_e[x.n, x.c, x.h, x.w] =") == 1


@pytest.mark.parametrize("steps", [
    "stage y at e window n h w c",
    "stage y at m window",
    "split f 4 -> f0 f1 tail=mask; stage y at e window n w c h; split y.w 4 -> y.w0 y.w1 tail=mask; peel y.w0; "
    "unroll y.w1",
    "split e 2 -> e0 e1 tail=mask; reorder n e0; stage y at e0 window n h w c align=h:64; vectorize y.c",
    "split m 4 -> m0 m1 tail=mask; reorder n m0 e f m1; stage y at e window n h w c; vectorize y.c",
])
def test_an_output_is_made_in_a_window(steps: str) -> None:
    done = after(LAYER, steps)
    assert sum(leaf.tensor == "y" for stage in done.stages for _, leaf in leaves(stage.body)) >= 1
    assert "y_at_" in nests(done)
    np.testing.assert_array_equal(outputs(done), outputs(LAYER))


def test_an_output_that_is_summed_into_is_not_made_in_a_window() -> None:
    refused(product(8, 4), "", "stage y at m window", "y is read inside m", "all that sums into it", "m")


def test_packed_in_the_order_of_use() -> None:
    done = after(LAYER, "reorder n e; stage x at e packed c r s f align=c:64")
    assert done.tensor("x_at_e").letters == ("c", "r", "s", "f")
    assert done.tensor("x_at_e").storage[0].stride == 64
    np.testing.assert_array_equal(outputs(done), outputs(LAYER))


def test_packed_takes_the_greatest_extent_of_copies() -> None:
    done = after(LAYER, "peel m; stage x at n packed c r s e f")
    assert done.tensor("x_at_n" if "x_at_n" in done.by_name else "x").shape == (4, 3, 3, 5, 7)


def test_layout_packs_when_weights_are_bound() -> None:
    done = after(LAYER, "split m 4 -> m0 m1 tail=mask; layout w m0 c r s m1")
    assert [(s.name, s.when) for s in done.stages][1] == ("pack w", "bind")
    assert done.tensor("w_packed").shape == (2, 4, 3, 3, 4)
    np.testing.assert_array_equal(outputs(done), outputs(LAYER))


PARTS = "the order {} does not name the axes n c h w"


@pytest.mark.parametrize(("before", "step", "why", "fix", "marked"), [
    ("", "stage y at root window", "all of y would be made twice", "makes a part of it", None),
    ("peel m", "stage y at n window", "2 statements use y inside n", "stage before peel", "n"),
    ("split e 4 -> e0 e1 tail=mask; split f 4 -> f0 f1 tail=mask; reorder n e0 m e1 f0 f1; peel e0",
     "stage y at m window n c h q", PARTS.format("n c h q"), "once", "m"),
    ("", "stage t at e window", "t is written by the program", "in registers", "e"),
    ("", "stage x at q window", "there is no loop q", "use one of", None),
    ("", "stage b at r window", "nothing inside r uses b", "another loop", "r"),
    ("", "stage x at e window n c h", PARTS.format("n c h"), "c/16 and c%16", "e"),
    ("", "stage x at e window n c h w w", PARTS.format("n c h w w"), "once", "e"),
    ("", "stage x at e window n c h q", PARTS.format("n c h q"), "once", "e"),
    ("", "stage x at e window n c/2 h w", PARTS.format("n c/2 h w"), "once", "e"),
    ("", "stage x at e window n c/2 h w c%4", PARTS.format("n c/2 h w c%4"), "once", "e"),
    ("", "stage x at e window n c/0 h w c%0", PARTS.format("n c/0 h w c%0"), "once", "e"),
    ("", "stage x at e window n c/ h w c%", PARTS.format("n c/ h w c%"), "once", "e"),
    ("", "stage x at e window n c h w align=q:16", "align=q:16 does not name a stride of n c h w", "entry", "e"),
    ("", "stage x at e window n c h w align=h:0", "align=h:0 does not name a stride", "positive", "e"),
    ("stage x at e window", "stage x at f window", "x is staged already", "once", "f"),
    ("stage y at e window", "stage y at e window", "y is staged already", "once", "e"),
    ("stage y at e window", "stage y at y.h window", "y is staged already", "once", "y.h"),
    *((before, f"stage {tensor} align={align}", why, fix, "m")
      for before, tensor in [("", "y at m window n c h w"),
                             ("attach init at m; attach epilogue at m", "t at m buffer n c h w")]
      for align, why, fix in [("q:16", "align=q:16 does not name a stride of n c h w", "entry"),
                              ("h:0", "align=h:0 does not name a stride", "positive"),
                              ("h:99999999", "elements for 35 that are used", "smaller multiples")]),
    ("stage x at e window", "stage x at x.h window", "x is staged already", "once", "x.h"),
    ("", "stage x at e packed c r s", "x is used by the loops c f r s", "exactly these", "e"),
    ("", "stage x at e packed c r s f f", "x is used by the loops c f r s", "exactly these", "e"),
    ("split f 4 -> f0 f1 tail=peel", "stage x at e packed c r s f0 f1", "read by 2 different indices",
     "pack before peel", "e"),
    ("", "stage b at m packed", "m uses one element of b", "outer loop", "m"),
    ("", "layout w m c r", "w is used by the loops c m r s", "exactly these", None),
    ("layout w m c r s", "layout w m c r s", "w is staged already", "once", None),
    ("reorder n m e c r s f; vectorize f", "stage x at f window", "x.n would be inside the vector loop f",
     "vectorize last", "f"),
])
def test_copies_refuse(before: str, step: str, why: str, fix: str, marked: str | None) -> None:
    refused(LAYER, before, step, why, fix, marked)


def test_window_refuses_accesses_that_differ_outside() -> None:
    text = "split e 2 -> e0 e1 tail=peel; reorder n m c e0 f"
    refused(LAYER, text, "stage x at f window", "accesses to x differ outside f", "an outer loop", "f")


def test_layout_refuses_inputs() -> None:
    with pytest.raises(ScheduleError, match="x is not a weight; use stage"):
        Layout("x", ("c",)).apply(product(8, 4))
    with pytest.raises(ScheduleError, match="there is no tensor q; use one of x, w, y"):
        Layout("q", ("c",)).apply(product(8, 4))


def test_a_step_alone_checks_as_apply_does() -> None:
    with pytest.raises(ScheduleError, match="there is no loop q"):
        StageAt("x", "q", "window").apply(product(8, 4))
