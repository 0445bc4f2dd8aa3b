"""The step that fetches ahead: what it may be asked for, what it leaves, and that results stay the same."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import convsched as cs
from convsched.errors import ScheduleError
from convsched.kernels.emit.llvm import emit
from convsched.lower.direct import lower_direct
from convsched.machine import Machine
from convsched.plan.families import named
from convsched.problem import Conv2d, Linear, Problem
from convsched.schedule import Prefetch, apply, parse_schedule

LAYER = Conv2d(12, 32, 1, bias=False, input_size=(4, 6))
PACKED = ("split m 32 -> m0 m1; split m1 16 -> m1a m2; split c 4 -> c0 c1; reorder n m0 e f c0 c1 m1a m2; "
          "attach init at f; attach epilogue at f; stage t at f registers; layout w m0 c0 c1 m1a m2; "
          "unroll c1 m1a; vectorize m2")


def test_text_and_schedule_are_the_same() -> None:
    schedule = parse_schedule("prefetch w_packed at c0 ahead=2")
    assert schedule.steps == (Prefetch("w_packed", "c0", 2),)
    assert schedule.text == "prefetch w_packed at c0 ahead=2"


def test_each_load_has_a_hint_some_iterations_ahead() -> None:
    kernel = cs.compile(LAYER, schedule=f"{PACKED}; prefetch w_packed at c0 ahead=2", threads=1, cache=False)
    plain = cs.compile(LAYER, schedule=PACKED, threads=1, cache=False)
    assert len(re.findall("call void @llvm.prefetch", kernel.llvm)) == 4 * 2  # c1, m1a
    assert "llvm.prefetch" not in plain.llvm
    assert "for c0 < 3 (w_packed 2 ahead):" in kernel.nest
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (LAYER.input_shape, LAYER.weight_shape))
    np.testing.assert_array_equal(kernel(x, weight), plain(x, weight))


def fetched_and_loaded(code: str) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
    """The addresses of LLVM text that are fetched ahead, and those that are loaded at pointers which are fetched at:
    each a pointer's name and a constant number of elements."""
    moved = {name: (base, int(by)) for name, base, by in re.findall(
        r"(%\S+) = getelementptr float, ptr (%\S+), i64 (-?\d+)$", code, re.MULTILINE)}
    fetched = Counter(moved.get(name, (name, 0)) for name in re.findall(r"@llvm\.prefetch\.p0\(ptr (%\S+),", code))
    loaded = {moved.get(name, (name, 0)) for name in re.findall(r"= load (?:<.*>|float), ptr (%\S+),", code)}
    bases = {base for base, _ in fetched}
    return fetched, Counter(place for place in loaded if place[0] in bases)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_hints_are_whole_iterations_ahead_of_the_loads(ahead: int) -> None:
    """An iteration of c0 reads 4 rows of 2 vectors of 16: 128 elements, one after another."""
    program = apply(lower_direct(LAYER), parse_schedule(f"{PACKED}; prefetch w_packed at c0 ahead={ahead}"))
    fetched, loaded = fetched_and_loaded(emit(program, Machine.example("avx512")))
    assert sorted(by for _, by in fetched) == [ahead * 128 + 16 * vector for vector in range(8)]
    assert sorted(by for _, by in loaded) == [16 * vector for vector in range(8)]


@pytest.mark.parametrize(("algorithm", "problem", "changed", "iteration"), [
    ("direct", Conv2d(16, 32, 3, padding=1, input_size=8), {"vectors": 2, "unroll": 4, "depth": 16}, 4 * 32),
    ("direct", Linear(24, 48), {"vectors": 3, "unroll": 2}, 2 * 48),
    ("im2col", Conv2d(16, 32, 3, padding=1, input_size=8), {"indirect": True, "vectors": 1, "unroll": 4}, 4 * 16),
    ("winograd(2,3)", Conv2d(16, 32, 3, padding=1, input_size=8), {"vectors": 2, "unroll": 2}, 2 * 32),
    ("winograd(4,3)", Conv2d(16, 16, (1, 3), input_size=14), {"vectors": 1, "unroll": 4, "by_lines": True}, 4 * 16),
    ("fft(8)", Conv2d(16, 32, 3, padding=1, input_size=8), {"vectors": 2, "unroll": 2}, 2 * 32),
])
def test_recipes_fetch_whole_iterations_ahead(algorithm: str, problem: Problem, changed: dict[str, Any],
                                              iteration: int) -> None:
    """``iteration``: the weights of the channels that are written out, for a register tile's output channels."""
    method, machine = named(algorithm, problem), Machine.example("avx512")
    recipe: Any = replace(method.default(machine, "nchw", 1), prefetch=3, **changed)
    program = apply(method.lower("nchw"), recipe.schedule(problem, "nchw"))
    fetched, loaded = fetched_and_loaded(emit(program, machine))
    assert fetched
    assert set(fetched) == {(base, by + 3 * iteration) for base, by in loaded}
    assert set(fetched.values()) == {1}  # each address once


@pytest.mark.parametrize(("step", "why"), [
    ("prefetch v at c0 ahead=2", "there is no tensor v in memory"),
    ("prefetch t at c0 ahead=2", "there is no tensor t in memory"),
    ("prefetch w_packed at q ahead=2", "there is no loop q"),
    ("prefetch w_packed at c0 ahead=0", "the distance is 0 iterations"),
    ("prefetch w_packed at c1 ahead=2", "a loop of kind unroll"),
    ("prefetch w_packed at f ahead=2", "do not read parts of w_packed one after another"),
    ("prefetch x at f ahead=2", "do not read parts of x one after another"),
])
def test_what_cannot_be_fetched_ahead(step: str, why: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        apply(lower_direct(LAYER), parse_schedule(f"{PACKED}; {step}"))
    assert why in caught.value.why
