"""The search for a problem's schedule: the default first, a race of the best by the model, then a climb; and while
there is budget, races of others and further climbs, until many in a row have improved nothing.

The search knows no clock and no process: it is given a function that measures a candidate against the
incumbent, one that estimates, and ones that say whether the budget, or the model's part of it, is spent. A
candidate replaces the incumbent by the rule by which the cache chooses: faster beyond the noise, else less
workspace, then the simpler schedule. However early the budget ends, the result is never slower than the
default.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, islice

from convsched.autotune.search.domain import Choice
from convsched.autotune.store.winner import Contender, winner
from convsched.autotune.workers.candidate import Outcome

RACERS = 12
IDLE_CANDIDATES = 48  # in a row that have improved nothing, after which the search is complete
ESTIMATES = 96  # candidates the model looks at for the race
FIRST_LOOKS, FIRST_NEAR = 16, 3  # those before the first is tried, in the race and near an incumbent


@dataclass(frozen=True)
class Measured:
    """A candidate, its schedule's text and what became of it; ``speed`` relative to the default (1 = equal)."""

    choice: Choice
    schedule: str
    outcome: Outcome
    speed: float


@dataclass
class Search:
    """One problem's search; ``tried`` grows as it runs, so that an interruption keeps what was measured.

    ``measure(choice, incumbent)`` gives a candidate timed in turn with the incumbent (None for the first);
    ``estimate(choice)`` is the model's seconds, or None where the choice makes no schedule; ``spent()`` is
    whether the budget is used up, ``may_rank()`` whether the model may look at one more only to order them.
    ``seeds`` are tried right after the default: other algorithms' own defaults.
    """

    default: Choice
    space: Sequence[Choice]
    near: Callable[[Choice], Sequence[Choice]]
    measure: Callable[[Choice, Measured | None], Measured]
    estimate: Callable[[Choice], float | None]
    spent: Callable[[], bool]
    may_rank: Callable[[], bool] = lambda: True
    seeds: Sequence[Choice] = ()
    tried: dict[Choice, Measured] = field(default_factory=dict)
    best: Measured | None = None
    complete: bool = False
    idle: int = 0
    _races: int = 0
    _raced: int = 0
    _estimates: dict[Choice, float] = field(default_factory=dict)
    _ahead: list[Choice] = field(default_factory=list)

    def recall(self, before: Iterable[Measured], complete: bool = False) -> None:
        """Go on from candidates that an earlier run has measured, the default among them. Where it was ``complete``,
        it races no further, even if final timings since have made another candidate the best."""
        for measured in before:
            self._keep(measured)
        if complete:
            self.idle = IDLE_CANDIDATES

    def run_default(self) -> Measured:
        """The default: measured now, unless it has been."""
        if self.default not in self.tried:
            self._try(self.default)
        return self.tried[self.default]

    def run(self) -> Measured | None:
        """Search until nothing improves or the budget is spent; the best found, None if not even the default
        ran. Called again, it goes on."""
        if self.run_default().outcome.status != "ok":
            return None
        racers = max(0, RACERS + 1 - len(self.tried))
        for candidate in chain((r for r in self.seeds if r not in self.tried), islice(self._racers(), racers)):
            if self.spent():
                return self.best
            self._try(candidate)
        while self._climb() and not self.spent():
            if self.idle >= IDLE_CANDIDATES or not self._race():
                self.complete = True
                break
        return self.best

    def _race(self) -> bool:
        """Measure some more candidates, named by the model from anywhere in the space; False if none is left."""
        order = list(self.space)
        random.Random(1).shuffle(order)
        start = self._races * ESTIMATES
        chosen = [r for r in order[start:start + ESTIMATES] if r not in self.tried]
        for candidate in self._ranked(chosen, FIRST_LOOKS):
            if self.spent():
                return True  # it goes on here
            if self._raced == RACERS:
                break
            self._try(candidate)
            self._raced += 1
        self._races, self._raced = self._races + 1, 0
        return start < len(order)

    def _try(self, choice: Choice) -> bool:
        """Measure a candidate; whether it became the incumbent."""
        return self._keep(self.measure(choice, self.best))

    def _keep(self, measured: Measured) -> bool:
        self.tried[measured.choice] = measured
        if measured.outcome.status != "ok" or not (self.best is None or better(measured, self.best)):
            self.idle += 1
            return False
        self.best, self.idle = measured, 0
        return True

    def _racers(self) -> Iterator[Choice]:
        """The candidates that the model names, the best first; it looks first at those near the default, or near
        the seed that has beaten it."""
        start = self.best.choice if self.best and self.best.choice in self.seeds else self.default
        space = [r for r in self.space if r != start]
        random.Random(0).shuffle(space)
        space.sort(key=lambda r: distance(r, start))
        return self._ranked([r for r in space[:ESTIMATES] if r not in self.tried], FIRST_LOOKS)

    def _climb(self) -> bool:
        """Measure the neighbours of the incumbent until none improves; False if the budget ended it."""
        while self.best is not None:
            start = self.best
            near = [r for r in self.near(start.choice) if r not in self.tried]
            for candidate in self._ranked(near, FIRST_NEAR):
                if self.spent():
                    return False
                if self._try(candidate):
                    break
            if self.best is start:
                return True
        return True

    def _ranked(self, choices: Sequence[Choice], first: int) -> Iterator[Choice]:
        """Those that make a schedule, the best of those that the model has looked at first: it looks at the
        ``first`` of them before any is tried, at others by ``look_ahead``, and at the rest when all are tried."""
        self._ahead = waiting = list(choices)
        for choice in waiting[:first]:
            if self.spent() or not self.may_rank():
                break
            self._estimate(choice)
        while waiting:
            seen = [r for r in waiting if r in self._estimates]
            choice = min(seen, key=self._estimates.__getitem__) if seen else waiting[0]
            waiting.remove(choice)
            if self.spent() or self._estimate(choice) < math.inf:
                yield choice

    def look_ahead(self) -> bool:
        """Let the model look at one more candidate that may be tried; whether there was one."""
        choice = next((r for r in self._ahead if r not in self._estimates), None)
        if choice is not None:
            self._estimate(choice)
        return choice is not None

    def _estimate(self, choice: Choice) -> float:
        if choice not in self._estimates:
            seconds = self.estimate(choice)
            self._estimates[choice] = math.inf if seconds is None else seconds
        return self._estimates[choice]


def better(candidate: Measured, incumbent: Measured) -> bool:
    """Whether a candidate replaces the incumbent: the rule by which the cache chooses, for these two."""
    pair = [Contender(1 / one.speed, one.outcome.workspace, one.schedule) for one in (incumbent, candidate)]
    return winner(pair, default=1.0) == 1


def distance(a: Choice, b: Choice) -> int:
    """In how many parameters two candidates differ; other algorithms and recipes are as far as can be."""
    if a.algorithm.name != b.algorithm.name or type(a.recipe) is not type(b.recipe):
        return len(fields(b.recipe))
    return sum(getattr(a.recipe, f.name) != getattr(b.recipe, f.name) for f in fields(a.recipe))
