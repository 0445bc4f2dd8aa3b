"""The cost model: counts that arithmetic on small nests confirms, and the order of clearly different schedules."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from convsched.autotune.search.space import candidates
from convsched.ir import Affine, Body, Load, Loop, Op, Program, Reduce, Stage, Store
from convsched.ir.examples import at, filtered, nest, product, scaled, tensor
from convsched.ir.text import print_nest
from convsched.lower.direct import lower_direct
from convsched.machine import Machine
from convsched.model.constants import CORE
from convsched.model.cost import Cost, Rates, cost
from convsched.model.issue import Issue
from convsched.model.traffic import Traffic
from convsched.plan.defaults import default_recipe
from convsched.plan.families import named
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.recipes.direct import Channels, Depthwise, Pixels
from convsched.recipes.recipe import Recipe
from convsched.schedule import apply, parse_schedule

MACHINE = Machine.example("avx512")
RATES = Rates(100e9, 100e9, 50e9, 20e9)
DENSE = Conv2d(64, 64, 3, padding=1, input_size=28)
DEPTHWISE = Conv2d(512, 512, 3, padding=1, groups=512, input_size=14, activation="relu")


def estimate(problem: Problem, recipe: Recipe, layout: str = "nchw", threads: int = 1) -> Cost:
    program = apply(lower_direct(problem, layout), recipe.schedule(problem, layout))
    return cost(program, MACHINE, RATES, threads)


def copy(rows: int, columns: int) -> Program:
    """y = x, row by row."""
    body = nest({"i": rows, "j": columns}, Store("y", at("i", "j"), Load("x", at("i", "j"))))
    tensors = (tensor("x", "ij", (rows, columns), "input"), tensor("y", "ij", (rows, columns), "output"))
    return Program("copy", tensors, (Stage("copy", body),))


def window(rows: int, taps: int, columns: int) -> Program:
    """y[e] = sum of x[e + r] over the taps, rows of vectors."""
    x = Load("x", (Affine.of("e") + "r", Affine.of("j")))
    body = nest({"e": rows, "r": taps, "j": columns}, Reduce("y", at("e", "j"), x))
    tensors = (tensor("x", "ej", (rows + taps - 1, columns), "input"),
               tensor("y", "ej", (rows, columns), "output"))
    return Program("window", tensors, (Stage("sum", body),))


def tile(vectors: int, pixels: int, channels: int) -> Program:
    """A register tile: t[m, f] += x[c, f] * w[c, m] with vectors of 16 maps and unrolled pixels."""
    product = Op("mul", (Load("x", at("c", "f")), Load("w", (Affine.of("c"), Affine.of("m1") * 16 + "m2"))))
    leaf = Reduce("t", (Affine.of("m1") * 16 + "m2", Affine.of("f")), product)
    body: Body = (Loop("m2", 16, (leaf,), "vector"),)
    body = (Loop("f", pixels, (Loop("m1", vectors, body, "unroll"),), "unroll"),)
    tensors = (tensor("x", "cf", (channels, pixels), "input"),
               tensor("w", "cm", (channels, 16 * vectors), "weight"),
               tensor("t", "mf", (16 * vectors, pixels), "register"))
    return Program("tile", tensors, (Stage("conv", (Loop("c", channels, body),)),))


def stored(order: str, pixels: int = 16) -> Program:
    """A tile in registers stored to y[m, f], with lanes along m, where memory has that order."""
    leaf = Store("y", at("m", "f"), Load("t", at("m", "f")))
    body = (Loop("f", pixels, (Loop("m", 16, (leaf,), "vector"),), "unroll"),)
    y = tensor("y", "mf", (16, 16), "output")
    storage = y.storage if order == "mf" else tuple(
        replace(stored, stride=stride) for stored, stride in zip(y.storage, (1, 16), strict=True))
    tensors = (tensor("t", "mf", (16, pixels), "register"), replace(y, storage=storage))
    return Program("store", tensors, (Stage("store", body),))


def footprint(program: Program, body: Body) -> dict[str, int]:
    return Traffic(program).of(body).bytes


def times(program: Program, load: float = 1.0) -> float:
    return sum(Issue(program, 16, load).time(stage.body) for stage in program.stages)


# Bytes


def test_data_that_fit_move_nothing_and_others_once_read_and_twice_written() -> None:
    traffic = Traffic(copy(64, 64))  # 16 KiB in, 16 KiB out
    assert traffic.into(32 << 10) == 0
    assert traffic.into(16 << 10) == (16 << 10) + 2 * (16 << 10)


def test_overlapping_rows_are_loaded_once_where_a_window_fits() -> None:
    traffic = Traffic(window(64, 3, 256))  # rows of 1 KiB; 66 are read, 64 written
    assert traffic.into(8 << 10) == (66 + 2 * 64) << 10  # 3 rows and one of y stay
    assert traffic.into(2 << 10) == (64 * 3 + 2 * 64) << 10  # one row and one of y stay


def test_a_peeled_copy_touches_no_new_data() -> None:
    peeled = apply(scaled(4, 6, 16), parse_schedule("split e 4 -> e0 e1 tail=mask; peel e0"))
    whole = apply(scaled(4, 6, 16), parse_schedule(""))
    (loops,), (before,) = (stage.body for stage in peeled.stages), (stage.body for stage in whole.stages)
    (loop,) = loops
    assert isinstance(loop, Loop)
    assert len(loop.body) == 2
    assert footprint(peeled, loops) == footprint(whole, before) == {
        "x": 4 * 6 * 16, "w": 64, "y": 4 * 4 * 6 * 16}


def test_a_small_plane_is_counted_in_lines_of_memory_not_of_rows() -> None:
    body = nest({"c": 8, "f": 7}, Store("y", at("c", "f"), Load("x", at("c", "f"))))
    tensors = (tensor("x", "cf", (8, 7), "input"), tensor("y", "cf", (8, 7), "output"))
    program = Program("plane", tensors, (Stage("copy", body),))
    assert footprint(program, body) == {"x": 256, "y": 256}  # 224 bytes in a row, in 4 lines


def test_rows_a_multiple_of_a_way_apart_do_not_fit_beside_each_other() -> None:
    def columns(rows: int, length: int) -> int:
        body = nest({"j": 64, "i": rows}, Store("y", at("j"), Load("x", at("i", "j"))))
        tensors = (tensor("x", "ij", (rows, length), "input"), tensor("y", "j", (64,), "output"))
        return Traffic(Program("columns", tensors, (Stage("read", body),))).into(32 << 10, 4096)

    assert columns(16, 512) == 0  # 2 KiB apart: 8 in each of two sets of lines, and 8 ways
    assert columns(24, 512) == 64 * (24 + 2) * 64  # every column reads 24 lines again, and one of y
    assert columns(24, 528) == 0


def test_border_elements_are_not_in_memory() -> None:
    padded = filtered(62, 3, pad=1)
    assert footprint(padded, padded.stages[1].body)["x"] == 256  # 62 elements, not 64


# Instructions


def test_a_register_tile_issues_its_products() -> None:
    assert times(tile(2, 14, 10)) == CORE.entry + 10 * (CORE.step + 28)


def test_a_thin_tile_waits_for_its_loads_or_its_sums() -> None:
    assert times(tile(6, 1, 10)) == CORE.entry + 10 * (CORE.step + 6 + CORE.broadcast)  # 6 vectors, 1 element
    assert times(tile(1, 2, 10)) == CORE.entry + 10 * (CORE.step + CORE.latency)
    assert times(tile(6, 1, 10), load=2.0) == CORE.entry + 10 * (CORE.step + 2 * (6 + CORE.broadcast))


def test_unrolled_iterations_share_their_loads() -> None:
    (rows,) = window(4, 3, 16).stages[0].body
    assert isinstance(rows, Loop)
    (taps,) = rows.body
    assert isinstance(taps, Loop)
    (columns,) = taps.body
    assert isinstance(columns, Loop)
    unrolled = replace(rows, kind="unroll", body=(
        replace(taps, kind="unroll", body=(replace(columns, kind="vector"),)),))
    slow = 10.0  # FMAs in a load, so that nothing else shows
    program = replace(window(4, 3, 16), stages=(Stage("sum", (unrolled,)),))
    assert times(program, slow) == slow * (6 + 12) + slow * CORE.store * 12  # rows 0 to 5 of x; y read and written


def test_loads_by_digits_are_those_of_the_loops_that_they_are_of() -> None:
    """A tile of 6 pixels reads 6 elements a channel, in the matrix of im2col or where they lie."""
    layer = Conv2d(4, 16, 3, input_size=(6, 6))
    tile = "split p 16 -> p2 p3; split p3 8 -> p0 p1; reorder n p2 p0 c r s p1 m; attach init at p0; " \
           "attach epilogue at p0; stage t at p0 registers; unroll p1; vectorize m"
    direct, matrix = (apply(named("im2col", layer).lower("nchw"), parse_schedule(f"{tile}{more}"))
                      for more in ("; inline i", ""))
    kept = replace(matrix, stages=tuple(stage for stage in matrix.stages if stage.name != "i"))
    assert "with" in print_nest(direct)
    assert times(direct, 10.0) == times(kept, 10.0)


def test_loads_across_two_lines_cost_more_and_loops_of_one_iteration_do_not_count() -> None:
    def read(offset: int, extra: int) -> float:
        index = (Affine.of("i") * 16 + "c" + "j" + offset,)
        leaf = Store("t", at("j"), Load("x", index))
        body: Body = (Loop("c", extra, (Loop("j", 16, (leaf,), "vector"),)),)
        tensors = (tensor("x", "w", (96,), "input"), tensor("t", "w", (16,), "register"))
        return times(Program("read", tensors, (Stage("read", (Loop("i", 4, body),)),)))

    aligned = CORE.entry + 4 * (CORE.step + 1)
    assert read(0, 1) == aligned
    assert read(3, 1) == aligned + 4 * CORE.split
    assert read(0, 2) > read(0, 1) * 2


def test_transposed_and_partial_stores_cost_what_they_do() -> None:
    plain, square, part = times(stored("fm")), times(stored("mf")), times(stored("mf", 7))
    assert plain == 16 * CORE.store
    assert plain < square < part * 16 / 7
    assert times(stored("mf", 1)) > times(stored("fm", 1))


def test_tests_of_the_border_cost() -> None:
    inside, padded = filtered(62, 3), filtered(62, 3, pad=1)
    assert times(padded) > times(inside)


def test_a_guard_that_bounds_a_loop_leaves_a_part_of_its_iterations_and_no_tests() -> None:
    inside, skipped = filtered(4, 3), apply(filtered(4, 3, pad=1), parse_schedule("skip x w"))
    product = (times(filtered(4, 4)) - times(inside)) / 4
    assert times(skipped) == pytest.approx(times(inside) - 2 * product)  # 10 products of 12


# The bound


def test_the_bound_shows_a_share_of_what_is_hidden() -> None:
    assert Cost(4.0, 2.0, 1.0, 0.0).seconds > 4.0
    assert Cost(4.0, 2.0, 1.0, 0.0).seconds < Cost(4.0, 3.0, 1.0, 0.0).seconds < Cost(5.0, 3.0, 1.0, 0.0).seconds


def test_rates_of_l1_are_those_of_vector_loads() -> None:
    assert Rates(100e9, 1e9, 1e9, 1e9).load(MACHINE) == 1.0
    assert Rates(100e9, 1e9, 1e9, 1e9, l1=400e9).load(MACHINE) == pytest.approx(0.5)  # 64 B for 32 FLOPs


def test_a_thread_has_its_share_and_the_remainder_counts() -> None:
    program = apply(product(48, 64), parse_schedule("split m 16 -> m0 m1; reorder m0 c m1; vectorize m1; parallel m0"))
    one, two, three = (cost(program, MACHINE, RATES, threads).issue for threads in (1, 2, 3))
    assert one == pytest.approx(3 / 2 * two, rel=0.01)
    assert three == pytest.approx(one / 3, rel=0.01)


def test_clearly_better_schedules_have_a_smaller_bound() -> None:
    dense = default_recipe(DENSE, MACHINE)
    assert isinstance(dense, Channels)
    good = estimate(DENSE, dense).seconds
    assert good < estimate(DENSE, replace(dense, vectors=1, pixels=4)).seconds  # few sums, many loads
    tested = replace(dense, pack="none", skip="")  # the border is tested at every load
    assert good < estimate(DENSE, tested).seconds
    wise = default_recipe(DEPTHWISE, MACHINE)
    assert isinstance(wise, Pixels)
    assert estimate(DEPTHWISE, wise).seconds < estimate(DEPTHWISE, replace(wise, unroll_taps=False)).seconds
    assert estimate(DEPTHWISE, wise).seconds < estimate(DEPTHWISE, replace(wise, rows=1)).seconds
    linear = default_recipe(Linear(1024, 1000, batch_size=32), MACHINE)
    assert isinstance(linear, Channels)
    assert estimate(Linear(1024, 1000, batch_size=32), linear).seconds < estimate(
        Linear(1024, 1000, batch_size=32), replace(linear, vectors=1, pixels=1)).seconds


def test_a_transposed_output_costs_more_than_a_blocked_one() -> None:
    layer = Conv2d(16, 64, 1, input_size=28)
    tile = default_recipe(layer, MACHINE)
    assert isinstance(tile, Channels)
    assert estimate(layer, replace(tile, pack="none")).issue > estimate(
        layer, replace(tile, pack="none"), "nchw16c").issue


LAYERS: list[Problem] = [
    DENSE,
    DEPTHWISE,
    Conv2d(30, 50, 3, padding=1, input_size=(13, 17)),
    Conv2d(100, 50, 1, input_size=7, batch_size=2),
    Conv2d(32, 64, 5, stride=2, padding=2, groups=32, input_size=19),
    Conv2d(64, 64, 3, padding=1, groups=4, input_size=14),
    Conv2d(3, 64, 7, stride=2, padding=3, input_size=32),
    Conv2d(64, 64, 3, padding=2, dilation=2, input_size=14, residual=True),
    Conv2d(64, 128, 1, stride=2, input_size=28),
    Conv2d(16, 16, 3, input_size=3, activation="silu"),
    Linear(256, 100),
    Linear(20, 3, batch_size=5),
]


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nchw16c"])
@pytest.mark.parametrize("problem", LAYERS, ids=str)
def test_every_candidate_is_legal_and_has_a_bound(problem: Problem, layout: str) -> None:
    threads = 1 + (layout == "nchw")
    found = [c.recipe for c in candidates(problem, Target(MACHINE, layout, threads), named("direct", problem))]
    for recipe in random.Random(0).sample(found, min(4, len(found))):
        assert isinstance(recipe, Channels | Pixels | Depthwise)
        seconds = estimate(problem, recipe, layout, threads).seconds
        assert math.isfinite(seconds)
        assert seconds > 0
