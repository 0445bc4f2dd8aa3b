"""The step that fetches ahead: what it may be asked for, what it leaves, and that results stay the same."""

from __future__ import annotations

import re

import numpy as np
import pytest

import convsched as cs
from convsched.errors import ScheduleError
from convsched.lower.direct import lower_direct
from convsched.problem import Conv2d
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


@pytest.mark.parametrize(("step", "why"), [
    ("prefetch v at c0 ahead=2", "there is no tensor v in memory"),
    ("prefetch t at c0 ahead=2", "there is no tensor t in memory"),
    ("prefetch w_packed at q ahead=2", "there is no loop q"),
    ("prefetch w_packed at c0 ahead=0", "0 iterations ahead"),
    ("prefetch w_packed at c1 ahead=2", "a loop of kind unroll"),
    ("prefetch w_packed at f ahead=2", "do not read parts of w_packed one after another"),
    ("prefetch x at f ahead=2", "do not read parts of x one after another"),
])
def test_what_cannot_be_fetched_ahead(step: str, why: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        apply(lower_direct(LAYER), parse_schedule(f"{PACKED}; {step}"))
    assert why in caught.value.why
