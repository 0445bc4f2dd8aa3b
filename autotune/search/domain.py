"""A recipe's parameters worth trying for a problem: their values, and which combinations fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from convsched.plan.families import Algorithm
from convsched.plan.plan import Plan, Target
from convsched.recipes.recipe import Recipe


@dataclass(frozen=True)
class Domain:
    """The values of a recipe's parameters, by name, and which combinations fit the target.

    Numbers are in ascending order. A parameter that is not named keeps the recipe's own default. Those in ``finer``
    do too where the domain is enumerated: they matter less, and are varied around what is good already. ``seed`` is
    the default of an algorithm whose only recipe this is.
    """

    recipe: Callable[..., Recipe]
    values: Mapping[str, tuple[Any, ...]]
    fits: Callable[[Any], bool]
    finer: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    algorithm: Algorithm = field(kw_only=True)
    seed: Recipe | None = None

    def __iter__(self) -> Iterator[Recipe]:
        for combination in itertools.product(*self.values.values()):
            made = self.recipe(**dict(zip(self.values, combination, strict=True)))
            if self.fits(made):
                yield made

    def neighbours(self, recipe: Recipe) -> Iterator[Recipe]:
        """The recipes that differ in one parameter: a number by one place in its list of values, wherever
        it lies itself; anything else by any other value."""
        options = {**self.values, **self.finer}
        for parameter in fields(recipe):
            name = parameter.name
            for value in _near(options.get(name, ()), getattr(recipe, name)):
                made = replace(recipe, **{name: value})
                if self.fits(made):
                    yield made


def _near(options: tuple[Any, ...], current: Any) -> tuple[Any, ...]:
    """The options next to a number, below and above; all others where there is no order."""
    if isinstance(current, bool) or not isinstance(current, int):
        return tuple(value for value in options if value != current)
    return (*[value for value in options if value < current][-1:],
            *[value for value in options if value > current][:1])


@dataclass(frozen=True)
class Choice:
    """A candidate: an algorithm, and the recipe that schedules it."""

    algorithm: Algorithm
    recipe: Recipe

    def plan(self, target: Target) -> Plan:
        """What it is for a target."""
        return Plan.of(self.algorithm, target, self.recipe)
