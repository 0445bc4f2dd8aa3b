"""Default recipes of any layer: no step refuses them, and what they write out is far from what compiles slowly.

Nothing is compiled: schedules are applied, and statements counted with their tests.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import product

import pytest

from convsched.errors import ConvschedError, LoweringError, ScheduleError
from convsched.kernels.emit.llvm import emit
from convsched.lower.direct import lower_direct
from convsched.machine import Isa, Machine
from convsched.plan.choice import choose
from convsched.plan.defaults import default_recipe
from convsched.plan.families import named
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import LAYOUTS
from convsched.recipes.direct import Depthwise
from convsched.schedule import apply, parse_schedule
from convsched.schedule.checks import STATEMENTS, written

ISAS: tuple[Isa, ...] = ("avx512", "avx2", "sse")
LINES = 24000  # of LLVM text, the most of a default kernel: below 2 s of LLVM on every instruction set


def flat() -> Iterator[Conv2d]:
    """1x1 layers around the sizes at which blocks of tiles begin to be ragged."""
    for c, m, size in product((1, 2, 3, 5, 7), (8, 16, 24, 64), (63, 64, 65, 67, 71, 75, 89, 101, 127, 149, 175)):
        yield Conv2d(c, m, 1, input_size=size, bias=False)
    for c, m, columns in product((1, 3, 8), (8, 16, 20), (4095, 4096, 4097, 5003, 6001, 12289)):
        yield Conv2d(c, m, 1, input_size=(1, columns))


def strange(seed: int | str, count: int) -> list[Conv2d]:
    """Layers of any kernel, stride, padding, dilation and groups, most of a kind that no network has."""
    draw, found = random.Random(seed), list[Conv2d]()
    taps, sizes, wide = (1, 2, 3, 3, 3, 5, 7, 9, 15), (1, 3, 7, 14, 20, 28, 56, 65, 100), (0, 0, 1, 1, 2, 3, 9, 21, 100)
    while len(found) < count:
        groups = draw.choice((1, 1, 2, 17, 19, 32))
        counts = (1, 1) if groups > 2 else (draw.choice((1, 3, 4, 8, 16, 33)), draw.choice((1, 4, 7, 8, 16, 22, 48)))
        padding = draw.choice((draw.choice(wide), tuple(draw.choice(wide) for _ in range(4))))
        try:
            found.append(Conv2d(
                groups * counts[0], groups * counts[1], (draw.choice(taps), draw.choice((*taps, 39))),
                draw.choice((1, 1, 1, 2, 3, 8, 32)), padding, draw.choice((1, 1, 1, 2, 8, 36)), groups,
                input_size=(draw.choice(sizes), draw.choice((*sizes, 264))), batch_size=draw.choice((1, 3)),
                activation=draw.choice((None, "relu", "silu")), residual=draw.random() < 0.2))  # fmt: skip
        except ConvschedError:  # a kernel larger than its image
            continue
    return found


def check(problem: Problem, isa: Isa, layout: str, threads: int) -> None:
    """Neither direct's default nor that of the chosen algorithm is refused or long."""
    machine = Machine.example(isa)
    algorithms = [named("direct", problem)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that none fits the accuracy
        chosen = choose(problem, Target(machine, layout, threads))
    for algorithm in algorithms if chosen.name == "direct" else [*algorithms, chosen]:
        try:
            program = apply(algorithm.lower(layout),
                            algorithm.default(machine, layout, threads).schedule(problem, layout))
        except ScheduleError as error:
            pytest.fail(f"{problem.text} {isa} {layout} {threads} {algorithm.name}: {str(error).splitlines()[0]}")
        count = written(program)
        assert count <= STATEMENTS, (problem.text, isa, layout, threads, algorithm.name, count)


@pytest.mark.parametrize("problem", [
    Conv2d(3, 16, 1, input_size=65), Conv2d(1, 64, 1, input_size=101), Conv2d(1, 16, 1, input_size=(1, 4097)),
    Conv2d(3, 4, 3, padding=100, input_size=20), Conv2d(17, 17, (3, 7), padding=50, groups=17, input_size=(20, 3)),
    Conv2d(17, 17, (7, 9), padding=(21, 13, 5, 13), groups=17, input_size=(20, 1), batch_size=3),
    Conv2d(16, 16, 3, padding=(36, 1), dilation=(36, 1), input_size=(14, 56)),
    Conv2d(33, 33, (15, 11), stride=4, padding=(0, 3, 0, 13), input_size=(65, 56), activation="silu"),
    Linear(3, 5003, batch_size=4099),
], ids=lambda problem: problem.text)
@pytest.mark.parametrize("isa", ISAS)
def test_no_step_refuses_the_defaults_of_strange_layers(isa: Isa, problem: Problem) -> None:
    for layout in LAYOUTS:
        check(problem, isa, layout, 2)


def test_no_step_refuses_the_defaults_of_a_sample() -> None:
    some = [*random.Random(0).sample(list(flat()), 10), *strange(0, 10)]
    for number, problem in enumerate(some):
        check(problem, ISAS[number % 3], (*LAYOUTS,)[number // 3 % 3], 1 + number % 2)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_step_refuses_any_default(layout: str, isa: Isa) -> None:
    """Each layer on 1 or on 2 threads, on both by some instruction sets; strange ones that no other pair tries."""
    first = ISAS.index(isa)
    for number, problem in enumerate((*flat(), *strange(f"{layout} {isa}", 150))):
        check(problem, isa, layout, 1 + (number + first) % 2)


@pytest.mark.parametrize(("problem", "algorithm", "layout", "isa"), [
    (Conv2d(3, 4, 3, padding=100, input_size=20), "direct", "nchw", "avx512"),
    (Conv2d(3, 4, 3, padding=100, input_size=20), "direct", "nhwc", "avx512"),
    (Conv2d(16, 16, 3, stride=32, input_size=64), "winograd", "nchw", "avx512"),
    (Conv2d(17, 17, (7, 9), padding=(21, 13, 5, 13), groups=17, input_size=(20, 1), batch_size=3,
            activation=("clip", -1.0, 1.5)), "direct", "nchw16c", "avx2"),
    (Conv2d(72, 72, 5, padding=2, groups=72, input_size=28), "direct", "nhwc", "avx512"),
], ids=["padding 100", "padding 100 nhwc", "stride 32", "17 channels", "72 channels"])
def test_the_text_of_defaults_is_short(problem: Conv2d, algorithm: str, layout: str, isa: Isa) -> None:
    machine, found = Machine.example(isa), named(algorithm, problem)
    program = apply(found.lower(layout), found.default(machine, layout, 1).schedule(problem, layout))
    assert emit(program, machine).count("\n") <= LINES


@pytest.mark.parametrize("isa", ["avx2", "sse"])
@pytest.mark.parametrize("channels", [8, 17, 24, 32, 40])
def test_blocks_of_channels_are_read_as_vectors(channels: int, isa: Isa) -> None:
    """Where a block of the layout has several vectors, none is gathered."""
    problem = Conv2d(channels, channels, 3, padding=1, groups=channels, input_size=14)
    recipe = default_recipe(problem, Machine.example(isa), "nchw16c")
    assert isinstance(recipe, Depthwise)
    code = emit(apply(lower_direct(problem, "nchw16c"), recipe.schedule(problem, "nchw16c")), Machine.example(isa))
    assert "gather" not in code
    assert "scatter" not in code


def test_tests_of_borders_count_as_written() -> None:
    """Each test that a run-time loop decides is code of its own, and so is each lane of a gather."""
    problem = Conv2d(16, 16, 3, padding=1, groups=16, input_size=8)
    program = lower_direct(problem)
    plain = written(apply(program, parse_schedule("unroll r s")))
    assert plain == 1 + 9 * (1 + 4) + 1  # h and w, both ends
    assert written(apply(lower_direct(Conv2d(16, 16, 3, groups=16, input_size=8)), parse_schedule("unroll r s"))) == 11


@pytest.mark.parametrize(("stride", "name"), [(3, "winograd(4,3)"), (32, "winograd(2,3)"), (60, "winograd(2,3)")])
def test_tiles_of_large_strides_are_small(stride: int, name: str) -> None:
    assert named("winograd", Conv2d(16, 16, 3, stride=stride, input_size=128)).name == name


@pytest.mark.parametrize("name", ["winograd", "winograd(2,3)"])
def test_a_stride_beyond_what_can_be_written_out_is_refused(name: str) -> None:
    with pytest.raises(LoweringError, match=r"would read 65 pixels along a side .* more than 64; use fewer outputs"):
        named(name, Conv2d(16, 16, 3, stride=62, input_size=128))
