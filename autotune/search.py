"""The search for a problem's schedule: the default first, a race of the best by the model, then a climb.

The search knows no clock and no process: it is given a function that measures a candidate against the
incumbent, one that estimates, and one that says whether the budget is spent. A candidate replaces the
incumbent when it is faster by more than the noise; within the noise, less workspace wins, then the shorter
schedule. However early the budget ends, the result is never slower than the default.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields

from convsched.autotune.worker import Outcome
from convsched.recipes import Recipe

NOISE = 0.02  # times closer than this are equal
RACERS = 12
ESTIMATES = 96  # candidates the model looks at before the race


@dataclass(frozen=True)
class Measured:
    """A candidate and what became of it; ``speed`` is that relative to the default (1 = equal)."""

    recipe: Recipe
    outcome: Outcome
    speed: float


@dataclass
class Search:
    """One problem's search; ``tried`` grows as it runs, so that an interruption keeps what was measured.

    ``measure(recipe, incumbent)`` gives the outcome of a candidate timed in turn with the incumbent (None
    for the first); ``estimate(recipe)`` is the model's seconds, or None where the recipe makes no schedule;
    ``spent()`` is whether the budget is used up.
    """

    default: Recipe
    space: Sequence[Recipe]
    near: Callable[[Recipe], Sequence[Recipe]]
    measure: Callable[[Recipe, Recipe | None], Outcome]
    estimate: Callable[[Recipe], float | None]
    spent: Callable[[], bool]
    tried: dict[Recipe, Measured] = field(default_factory=dict)
    best: Measured | None = None
    complete: bool = False
    _estimates: dict[Recipe, float] = field(default_factory=dict)

    def run(self) -> Measured | None:
        """Search until nothing improves or the budget is spent; the best found, None if not even the
        default ran."""
        if self.default not in self.tried:
            self._try(self.default)
        if self.best is None:
            return None
        for candidate in self._racers():
            if self.spent():
                return self.best
            self._try(candidate)
        self.complete = self._climb()
        return self.best

    def _try(self, recipe: Recipe) -> bool:
        """Measure a candidate; whether it became the incumbent."""
        incumbent = self.best
        outcome = self.measure(recipe, incumbent.recipe if incumbent else None)
        speed = 1.0
        if incumbent is not None and outcome.status == "ok":
            speed = incumbent.speed / outcome.ratio
        self.tried[recipe] = measured = Measured(recipe, outcome, speed)
        if outcome.status != "ok":
            return False
        if incumbent is None or better(measured, incumbent):
            self.best = measured
            return True
        return False

    def _racers(self) -> Iterator[Recipe]:
        """The candidates that the model names, the best first; it looks at those near the default first."""
        space = [r for r in self.space if r not in self.tried]
        random.Random(0).shuffle(space)
        space.sort(key=lambda r: distance(r, self.default))
        yield from self._ranked(space[:ESTIMATES])[:RACERS]

    def _climb(self) -> bool:
        """Measure the neighbours of the incumbent until none improves; False if the budget ended it."""
        while self.best is not None:
            start = self.best
            near = [r for r in self.near(start.recipe) if r not in self.tried]
            for candidate in self._ranked(near):
                if self.spent():
                    return False
                if self._try(candidate):
                    break
            if any(r not in self._estimates for r in near):
                return False  # the budget ended before the model had seen them
            if self.best is start:
                return True
        return True

    def _ranked(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        for recipe in recipes:
            if recipe not in self._estimates and not self.spent():
                seconds = self.estimate(recipe)
                self._estimates[recipe] = float("inf") if seconds is None else seconds
        known = [r for r in recipes if self._estimates.get(r, float("inf")) < float("inf")]
        return sorted(known, key=lambda r: self._estimates[r])


def better(candidate: Measured, incumbent: Measured) -> bool:
    """Whether a candidate replaces the incumbent: faster beyond the noise, or equal and smaller."""
    if candidate.speed > incumbent.speed * (1 + NOISE):
        return True
    if candidate.speed < incumbent.speed * (1 - NOISE / 2):
        return False
    return candidate.outcome.workspace < incumbent.outcome.workspace


def distance(a: Recipe, b: Recipe) -> int:
    """In how many parameters two recipes differ; other kinds of recipe are as far as can be."""
    if type(a) is not type(b):
        return len(fields(b))
    return sum(getattr(a, f.name) != getattr(b, f.name) for f in fields(a))
