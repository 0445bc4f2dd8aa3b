"""The candidates of a problem: legal schedules, the default first, recipes that register themselves."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from convsched.autotune.search import parameters, space
from convsched.autotune.search.domain import Choice, Domain
from convsched.lower.direct import lower_direct
from convsched.machine import Machine
from convsched.model.cost import Rates, cost
from convsched.plan.defaults import default_recipe
from convsched.plan.families import named
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.recipes.direct import Channels, Depthwise, Pixels
from convsched.recipes.recipe import Recipe
from convsched.schedule import Schedule, apply, parse_schedule

MACHINE = Machine.example("avx512")
TARGET = Target(MACHINE)
DEPTHWISE = Conv2d(512, 512, 3, padding=1, groups=512, input_size=14, activation="relu")
POINTWISE = Conv2d(512, 512, 1, input_size=14, activation="relu")
DENSE = Conv2d(64, 64, 3, padding=1, input_size=28)
RATES = Rates(100e9, 100e9, 50e9, 20e9)


def candidates(problem: Problem, target: Target = TARGET) -> tuple[Recipe, ...]:
    """The recipes of direct convolution, the default first."""
    return tuple(choice.recipe for choice in space.candidates(problem, target, named("direct", problem)))


def neighbours(problem: Problem, recipe: Recipe) -> tuple[Recipe, ...]:
    near = space.neighbours(TARGET, Choice(named("direct", problem), recipe))
    return tuple(choice.recipe for choice in near)


def seconds(problem: Problem, recipe: Recipe, rates: Rates = RATES, threads: int = 1) -> float:
    return cost(apply(lower_direct(problem), recipe.schedule(problem)), MACHINE, rates, threads).seconds


def test_depthwise_and_pointwise_layers_have_different_spaces() -> None:
    assert {type(recipe) for recipe in candidates(DEPTHWISE)} == {Pixels}
    assert {type(recipe) for recipe in candidates(POINTWISE)} == {Channels}


@pytest.mark.parametrize("problem", [DEPTHWISE, POINTWISE, DENSE, Linear(256, 100)])
def test_the_default_is_first_and_a_sample_is_legal(problem: Problem) -> None:
    found = candidates(problem)
    assert found[0] == default_recipe(problem, MACHINE)
    assert len(set(found)) == len(found)
    for recipe in found[::max(1, len(found) // 8)]:
        assert seconds(problem, recipe) > 0


def test_neighbours_differ_in_one_parameter() -> None:
    default = candidates(DENSE)[0]
    near = neighbours(DENSE, default)
    assert near
    for recipe in near:
        assert sum(getattr(recipe, f.name) != getattr(default, f.name) for f in fields(recipe)) == 1


def test_a_number_outside_of_its_domain_has_neighbours_below_and_above() -> None:
    default = candidates(DENSE)[0]
    assert isinstance(default, Channels)
    blocks = {near.block for near in neighbours(DENSE, replace(default, block=10)) if isinstance(near, Channels)}
    assert blocks == {7, 10, 14}


@dataclass(frozen=True)
class Rows:
    """A recipe of its own: vectors of output channels, so many pixels of a row unrolled."""

    lanes: int
    unrolled: int
    name = "rows"

    def schedule(self, problem: Problem, layout: str = "nchw") -> Schedule:
        return parse_schedule(f"split m {self.lanes} -> m0 m1; split f {self.unrolled} -> f0 f1; "
                              "reorder n m0 e f0 c r s f1 m1; attach init at f0; attach epilogue at f0; "
                              "stage t at f0 registers; unroll f1; vectorize m1; parallel m0")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Rows`` as the only recipe of the space."""
    def rows(problem: Problem, target: Target) -> Domain | None:
        if not isinstance(problem, Conv2d) or problem.groups > 1:
            return None
        columns = problem.F
        return Domain(Rows, {"lanes": (4, 8, 16), "unrolled": (1, 2, 4, 7, 14)},
                      lambda recipe: columns % recipe.unrolled == 0, algorithm=named("direct", problem))

    monkeypatch.setattr(space, "MAKERS", (rows,))


@pytest.mark.usefixtures("registered")
def test_a_recipe_joins_by_registering_its_domain() -> None:
    default, *found = candidates(DENSE)
    assert isinstance(default, Channels)
    assert found == [Rows(lanes, unrolled) for lanes in (4, 8, 16) for unrolled in (1, 2, 4, 7, 14)]
    assert set(neighbours(DENSE, Rows(8, 4))) == {Rows(4, 4), Rows(16, 4), Rows(8, 2), Rows(8, 7)}
    assert seconds(DENSE, Rows(16, 14)) < seconds(DENSE, Rows(16, 1)) < seconds(DENSE, Rows(4, 1))
    assert len(candidates(DEPTHWISE)) == 1  # it does not apply: the default alone


def test_only_copies_that_a_layout_allows_are_offered() -> None:
    packs = {layout: {recipe.pack for recipe in candidates(POINTWISE, Target(MACHINE, layout))
                      if isinstance(recipe, Channels)} for layout in ("nchw", "nhwc", "nchw16c")}
    assert packs == {"nchw": {"none", "packed"}, "nhwc": {"none"}, "nchw16c": {"none"}}


def channels_of(problem: Problem, target: Target = TARGET) -> list[Channels]:
    return [recipe for recipe in candidates(problem, target) if isinstance(recipe, Channels)]


def test_a_border_is_copied_or_its_products_are_left_out() -> None:
    found = channels_of(DENSE)
    assert {(r.pack, r.skip) for r in found} == {("none", "hw"), ("window", ""), ("window", "h")}
    assert all(r.rows == 1 for r in found if r.skip)
    sideways = Conv2d(64, 64, (1, 3), padding=(0, 1), input_size=28)
    assert {(r.pack, r.skip) for r in channels_of(sideways)} == {("none", "hw"), ("window", "")}
    plain = Conv2d(64, 64, 3, input_size=28)
    assert {(r.pack, r.skip) for r in channels_of(plain)} == {("none", ""), ("window", "")}


def test_tiles_use_all_registers_where_products_broadcast_from_memory() -> None:
    def most(machine: Machine) -> int:
        return max(r.vectors * r.rows * r.pixels + r.vectors for r in channels_of(DENSE, Target(machine))[1:])

    assert most(MACHINE) == MACHINE.registers
    assert any((r.vectors, r.pixels) == (4, 7) for r in channels_of(DENSE))
    assert most(Machine.example("avx2")) < Machine.example("avx2").registers


def test_finer_parameters_are_varied_where_they_change_the_schedule() -> None:
    problem = Conv2d(512, 512, 3, padding=1, input_size=(7, 30))
    (domain,) = space.domains(problem, TARGET, named("direct", problem))
    ragged = Channels(lanes=16, vectors=2, rows=1, pixels=14, block=7, depth=64, unroll=4, pack="window")
    assert {r.tail for r in channels_of(problem)} == {"peel"}

    def near(recipe: Channels, name: str) -> set[object]:
        return {getattr(r, name) for r in domain.neighbours(recipe)} - {getattr(recipe, name)}

    assert near(ragged, "tail") == {"overlap", "mask"}
    assert near(replace(ragged, pixels=6), "tail") == set()
    assert near(replace(ragged, pack="none", skip="hw"), "tail") == {"mask"}
    assert near(ragged, "align") == {parameters.ALIGN_ELEMENTS}
    assert near(replace(ragged, pack="none", skip="hw"), "align") == set()
    assert near(ragged, "prefetch") == {8}
    for recipe in domain.neighbours(ragged):
        assert seconds(problem, recipe) > 0


def test_written_out_taps_leave_registers_for_inputs() -> None:
    tiles = {(r.rows, r.pixels, r.unroll_taps) for r in candidates(DEPTHWISE, Target(MACHINE, "nchw16c"))
             if isinstance(r, Depthwise)}
    assert (2, 8, True) in tiles
    assert not {(4, 6, True), (2, 14, True)} & tiles
    assert {(4, 6, False), (2, 14, False)} <= tiles


def test_short_rows_may_have_half_a_register() -> None:
    lanes = {r.lanes for r in candidates(DEPTHWISE) if isinstance(r, Pixels)}
    assert lanes == {8, 16}


def test_layers_of_few_maps_have_a_space_in_every_layout() -> None:
    thin = Conv2d(32, 64, 5, stride=2, padding=2, groups=32, input_size=19)
    for problem in (thin, Linear(20, 3, batch_size=5)):
        for layout in ("nchw", "nhwc", "nchw16c"):
            assert len(candidates(problem, Target(MACHINE, layout))) > 1


def test_the_bound_falls_with_bandwidth_and_threads() -> None:
    default = candidates(DENSE)[0]
    assert seconds(DENSE, default, Rates(100e9, 10e9, 5e9, 2e9)) > seconds(DENSE, default)
    shared = candidates(DENSE, Target(MACHINE, threads=2))[0]
    assert seconds(DENSE, shared, threads=2) < seconds(DENSE, shared)
    assert seconds(DENSE, default) >= DENSE.flops / RATES.peak
