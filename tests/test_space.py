"""The candidates of a problem: legal schedules, the default first, recipes that register themselves."""

from __future__ import annotations

from dataclasses import fields

import pytest

from convsched.analytic import default_recipe
from convsched.autotune import space
from convsched.autotune.model import Rates, cost
from convsched.autotune.space import Target, candidates, neighbours
from convsched.lower.direct import lower_direct
from convsched.machine import Machine
from convsched.problem import Conv2d, Linear, Problem
from convsched.recipes import Channels, Pixels
from convsched.schedule import apply

MACHINE = Machine.example("avx512")
DEPTHWISE = Conv2d(512, 512, 3, padding=1, groups=512, input_size=14, activation="relu")
POINTWISE = Conv2d(512, 512, 1, input_size=14, activation="relu")
DENSE = Conv2d(64, 64, 3, padding=1, input_size=28)
RATES = Rates(100e9, 100e9, 50e9, 20e9)


def seconds(problem: Problem, recipe: space.Recipe, rates: Rates = RATES, threads: int = 1) -> float:
    return cost(apply(lower_direct(problem), recipe.schedule(problem)), MACHINE, rates, threads).seconds


def test_depthwise_and_pointwise_layers_have_different_spaces() -> None:
    assert {type(recipe) for recipe in candidates(Target(DEPTHWISE, MACHINE))} == {Pixels}
    assert {type(recipe) for recipe in candidates(Target(POINTWISE, MACHINE))} == {Channels}


@pytest.mark.parametrize("problem", [DEPTHWISE, POINTWISE, DENSE, Linear(256, 100)])
def test_the_default_is_first_and_a_sample_is_legal(problem: Problem) -> None:
    found = candidates(Target(problem, MACHINE))
    assert found[0] == default_recipe(problem, MACHINE)
    assert len(set(found)) == len(found)
    for recipe in found[::max(1, len(found) // 8)]:
        assert seconds(problem, recipe) > 0


def test_neighbours_differ_in_one_parameter() -> None:
    target = Target(DENSE, MACHINE)
    default = candidates(target)[0]
    near = neighbours(target, default)
    assert near
    for recipe in near:
        assert sum(getattr(recipe, f.name) != getattr(default, f.name) for f in fields(recipe)) == 1


def test_a_registered_recipe_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "_MAKERS", [])
    target = Target(DENSE, MACHINE)
    assert len(candidates(target)) == 1  # the default alone
    space.register(space.channels)
    assert len(candidates(target)) > 100


def test_the_bound_falls_with_bandwidth_and_threads() -> None:
    default = candidates(Target(DENSE, MACHINE))[0]
    assert seconds(DENSE, default, Rates(100e9, 10e9, 5e9, 2e9)) > seconds(DENSE, default)
    assert seconds(DENSE, default, threads=2) < seconds(DENSE, default)
    assert seconds(DENSE, default) >= DENSE.flops / RATES.peak
