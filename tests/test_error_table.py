"""The table of predicted and measured errors: its tiles and norms, what must hold, and what is not accurate enough."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import errors

import convsched as cs
from convsched.ir import Affine
from convsched.lower.plane import Plane
from convsched.plan.families import named
from convsched.problem import Conv2d

GOOD = errors.Row("conv2d a", "direct", "normal", "strict", 1e-6, 1e-4, 1e-3, 1e-5, 1.0, 1.0)


# Norms

@pytest.mark.parametrize(("problem", "algorithm"), [
    (Conv2d(3, 2, 3, padding=1, input_size=(6, 9)), "direct"),
    (Conv2d(3, 2, 3, padding=1, input_size=(6, 9)), "winograd(4,3)"),
    (Conv2d(3, 2, (3, 5), padding=(0, 2, 1, 1), input_size=(6, 9)), "winograd(4,3)x(2,5)"),
    (Conv2d(3, 2, (1, 7), padding=(0, 3), input_size=(3, 9)), "winograd(2,7)"),
    (Conv2d(3, 2, 5, padding=2, input_size=(9, 12)), "fft(8)x(16)"),
    (Conv2d(2, 2, (1, 20), input_size=(2, 60)), "fft(8)x(8)"),
    (Conv2d(2, 2, (20, 1), padding=(3, 0), input_size=(60, 2)), "fft(8)x(8)"),
])
def test_the_greatest_norm_is_that_of_the_tiles_that_are_lowered(problem: Conv2d, algorithm: str) -> None:
    x = np.random.default_rng(3).standard_normal(problem.input_shape).astype(np.float32)
    tiles = errors.tiles_of(problem, algorithm)
    plane = Plane(problem, tiles.outputs, tiles.fold)
    top, left = problem.padding[:2]
    squares = np.zeros((1000, 1000))
    squares[top:top + problem.H, left:left + problem.W] = np.square(x, dtype=np.float64).sum((0, 1))
    greatest = 0.0
    for place in np.ndindex(plane.tiles):
        total = 0.0
        for i, j in np.ndindex(tiles.reads):
            at = dict(zip("tuij", (*place, i, j), strict=True))
            row, column = (value(affine, at) for affine in plane.place("t", "u", "i", "j"))
            total += squares[row, column]
        greatest = max(greatest, total)
    assert tiles.greatest_norm(problem, x) == pytest.approx(math.sqrt(greatest))


def value(affine: Affine, at: dict[str, int]) -> int:
    return affine.constant + sum(factor * at[name] for name, factor in affine.terms)


def test_tiles_read_what_the_triples_read() -> None:
    problem = Conv2d(2, 2, (1, 20), input_size=(2, 60))
    program = named("fft(8)x(8)", problem).lower("nchw")
    tiles = errors.tiles_of(problem, "fft(8)x(8)")
    assert tiles.fold == "w"
    assert tiles.reads == (program.tensor("B1").shape[1], program.tensor("B'1").shape[1])


def test_the_filters_and_tiles_of_strassen_are_of_all_blocks() -> None:
    problem = Conv2d(8, 8, 1, input_size=4, bias=False)
    x, weight = errors.data(problem, "normal", 0)
    direct, nested = named("direct", problem), named("strassen(2)", problem)
    ratio = (errors.bound(problem, "strassen(2)", nested.prediction, x, weight)
             / errors.bound(problem, "direct", direct.prediction, x, weight))
    assert ratio == pytest.approx(4 * nested.prediction.norm_bound / direct.prediction.norm_bound)


# Data

def test_kinds_of_data() -> None:
    problem = Conv2d(6, 4, 1, input_size=40)
    found = {kind: errors.data(problem, kind, 1)[0] for kind in errors.KINDS}
    assert found["relu"].min() == 0
    assert found["mean"].mean() == pytest.approx(10, abs=0.1)
    assert np.square(found["huge"]).mean((0, 2, 3)).argmax() == 2
    assert all(x.dtype == np.float32 for x in found.values())


@pytest.mark.parametrize("name", errors.LAYERS)
def test_every_algorithm_of_the_table_applies_to_its_layer(name: str) -> None:
    problem = errors.layer_of(name, 64)
    for algorithm in errors.LAYERS[name][2]:
        assert named(algorithm, problem).name == algorithm


# What must hold

@pytest.mark.parametrize(("kind", "measured", "holds"), [
    ("normal", 9e-5, True), ("normal", 2e-4, False), ("relu", 2e-4, False),
    ("mean", 2e-4, True), ("huge", 9e-4, True), ("mean", 2e-3, False), ("huge", math.inf, False),
    ("huge", math.nan, False),
])
def test_worst_is_for_equal_norms_and_the_bound_for_all_data(kind: str, measured: float, holds: bool) -> None:
    assert replace(GOOD, kind=kind, measured=measured).holds is holds


def test_what_is_not_accurate_enough_is_a_note_and_no_failure() -> None:
    problem = Conv2d(64, 16, 3, padding=1, bias=False, input_size=6)
    rows = list(errors.measure(problem, ["winograd(2,3)", "winograd(10,3)"], ["normal", "mean"], "nchw", 0))
    assert [(row.algorithm, row.kind) for row in rows] == [
        ("direct", "normal"), ("direct", "mean"), ("winograd(2,3)", "normal"), ("winograd(2,3)", "mean"),
        ("winograd(10,3)", "all")]
    assert "no class takes it" in rows[-1].note
    assert all(row.holds for row in rows)
    assert all(0 < row.measured < row.bound for row in rows[:-1])
    assert [(row.rms_ratio, row.ratio) for row in rows[:2]] == [(1, 1), (1, 1)]
    assert rows[2].expected == cs.compile(problem, algorithm="winograd(2,3)", cache=False).predicted_error.expected
    told = json.loads(json.dumps(errors.to_json(rows, "nchw", 0), allow_nan=False))
    assert told["rows"][-1]["measured"] is None
    text = printed(errors.table(rows))
    assert "winograd(10,3): accuracy='fast': winograd(10,3) has an expected error" in text.replace("\n", " ")


def test_a_broken_bound_is_marked() -> None:
    assert " ! " not in printed(errors.table([GOOD]))
    assert " ! " in printed(errors.table([replace(GOOD, measured=1.0)]))


def printed(table: Any) -> str:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
