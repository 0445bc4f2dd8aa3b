"""Tuning: a measured search for each layer, remembered in the schedule cache.

Times of one run are kept relative to the default of that run: a record's ``hot`` is the default's time
divided by the candidate's measured speed-up, so that records compare although the machine drifts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from convsched.autotune.cache import ScheduleCache
from convsched.autotune.calibrate import calibration
from convsched.autotune.measure import now
from convsched.autotune.model import Rates, cost
from convsched.autotune.record import Key, Record
from convsched.autotune.search import Search
from convsched.autotune.space import Target, candidates, neighbours
from convsched.autotune.worker import Job, Outcome, Worker
from convsched.errors import ConvschedError
from convsched.lower.direct import lower_direct
from convsched.machine import Machine, default_threads
from convsched.problem import Problem
from convsched.recipes import Recipe
from convsched.schedule import Schedule, apply, parse_schedule

MOST_FAILURES = 0.5  # of the candidates; more, and the search says so instead of going on
LEAST_TRIES = 8  # before the share of failures means something


class TuneError(ConvschedError):
    """Tuning that cannot go on: a wrong budget, or a default that does not run."""


@dataclass(frozen=True)
class Budget:
    """Seconds, candidates, or both; ``parse`` takes "10s", "2m", "1h" or "100 candidates"."""

    seconds: float = float("inf")
    candidates: float = float("inf")

    @staticmethod
    def parse(text: str) -> Budget:
        """The budget of a text; raises TuneError."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|candidates?)\s*", text)
        if match is None:
            raise TuneError(f"budget {text!r}: write a time such as 10s, 2m or 1h, or 100 candidates")
        amount, unit = float(match[1]), match[2]
        if unit.startswith("c"):
            return Budget(candidates=amount)
        return Budget(seconds=amount * {"s": 1, "m": 60, "h": 3600}[unit])

    def __str__(self) -> str:
        return f"{self.seconds:g}s" if self.candidates == float("inf") else f"{self.candidates:g} candidates"


@dataclass(frozen=True)
class Progress:
    """Where a search stands after a candidate: its outcome, the best speed-up, counts, seconds left."""

    problem: Problem
    outcome: Outcome
    speed: float
    tried: int
    failed: int
    left: float


@dataclass(frozen=True)
class Tuned:
    """What tuning found: the best schedule, its speed-up over the default as timed at the end in turn."""

    problem: Problem
    schedule: Schedule
    recipe: str
    speed: float
    default_seconds: float
    tried: int
    failures: Mapping[str, int]
    complete: bool

    @property
    def seconds(self) -> float:
        """A call with the best schedule."""
        return self.default_seconds / self.speed


@dataclass
class Tuner:
    """Tunes problems one after another with one worker process; a context manager."""

    cache: ScheduleCache
    threads: int
    layout: str = "nchw"
    accuracy: str = "normal"
    report: Callable[[Progress], None] = lambda _: None
    clock: Callable[[], float] = now

    def __post_init__(self) -> None:
        self.machine = Machine.host()
        known = calibration()
        self.rates = Rates(known.peak, *(known.bandwidth[level] for level in ("l2", "l3", "dram")))
        self.worker = Worker()

    def __enter__(self) -> Tuner:
        self.worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()

    def tune(self, problem: Problem, budget: Budget) -> Tuned:
        """Search one problem; every candidate is in the cache as soon as it is measured."""
        run = _Run(self, problem, budget)
        try:
            return run.finish(run.search.run() is not None)
        except (KeyboardInterrupt, ConvschedError):
            run.mark(complete=False)
            raise


class _Run:
    """The search of one problem, tied to the worker and the cache."""

    def __init__(self, tuner: Tuner, problem: Problem, budget: Budget) -> None:
        self.tuner, self.problem, self.budget = tuner, problem, budget
        self.target = Target(problem, tuner.machine, tuner.layout, tuner.threads)
        self.key = Key.of(problem, tuner.machine, layout=tuner.layout, threads=tuner.threads,
                          accuracy=tuner.accuracy)
        self.known = {record.schedule: record for record in tuner.cache.records(self.key)}
        self.failures: dict[str, int] = {}
        self.measured = 0
        self.start = tuner.clock()
        self.default_seconds = float("nan")
        space = candidates(self.target)
        self.search = Search(space[0], space, lambda r: neighbours(self.target, r), self.measure,
                             self.estimate, self.spent)

    def text(self, recipe: Recipe) -> str:
        return recipe.schedule(self.problem, self.tuner.layout).text

    def job(self, schedule: str, incumbent: str, cold: bool = False) -> Job:
        return Job(self.problem.text, self.tuner.layout, self.tuner.threads, schedule, incumbent, cold)

    def left(self) -> float:
        return self.budget.seconds - (self.tuner.clock() - self.start)

    def spent(self) -> bool:
        return self.left() <= 0 or self.measured >= self.budget.candidates

    def estimate(self, recipe: Recipe) -> float | None:
        """The model's seconds; None for parameters that make no legal schedule."""
        try:
            schedule = recipe.schedule(self.problem, self.tuner.layout)
            program = apply(lower_direct(self.problem, self.tuner.layout), schedule)
        except ConvschedError:
            return None
        return cost(program, self.tuner.machine, self.tuner.rates, self.tuner.threads).seconds

    def measure(self, recipe: Recipe, incumbent: Recipe | None) -> Outcome:
        """Recorded already, or by the worker; recorded at once."""
        schedule = self.text(recipe)
        before = self.known.get(schedule)
        against = self.text(incumbent) if incumbent is not None else ""
        if incumbent is None and before is not None and before.hot is not None:
            self.default_seconds = before.hot
            return _recalled(before, before)
        if before is not None and incumbent is not None and (other := self.known.get(against)) is not None:
            return _recalled(before, other)
        outcome = self.tuner.worker.run(self.job(schedule, against, cold=True))
        self.measured += 1
        if incumbent is None:
            self.default_seconds = outcome.hot
        self.record(recipe, outcome, is_default=incumbent is None)
        self.count(outcome)
        return outcome

    def count(self, outcome: Outcome) -> None:
        """Report, and stop a search in which most candidates fail."""
        if outcome.status != "ok":
            reason = f"{outcome.status}: {outcome.message}"
            self.failures[reason] = self.failures.get(reason, 0) + 1
        failed = sum(self.failures.values())
        best = self.search.best
        speed = best.speed if best else 1.0
        self.tuner.report(Progress(self.problem, outcome, speed, self.measured, failed, self.left()))
        if self.measured >= LEAST_TRIES and failed > MOST_FAILURES * self.measured:
            raise TuneError(f"{failed} of {self.measured} candidates of {self.problem.text} failed: "
                            + "; ".join(f"{n} x {reason}" for reason, n in self.failures.items()))

    def record(self, recipe: Recipe, outcome: Outcome, is_default: bool) -> None:
        best = self.search.best
        hot: float | None = None
        if outcome.status == "ok":
            hot = outcome.hot if best is None else self.default_seconds / best.speed * outcome.ratio
        scale = hot / outcome.hot if hot else 1.0
        made = Record(
            problem=self.key.problem, layout=self.key.layout, threads=self.key.threads,
            accuracy=self.key.accuracy, machine=self.key.machine, algorithm="direct", recipe=repr(recipe),
            schedule=self.text(recipe), status=outcome.status, message=outcome.message, hot=hot,
            cold=outcome.cold * scale, spread=outcome.spread, error=outcome.error,
            workspace=outcome.workspace, samples=outcome.samples, is_default=is_default,
            time=self.tuner.clock())
        self.known[made.schedule] = made
        self.tuner.cache.put(made)

    def finish(self, found: bool) -> Tuned:
        """Time the winner against the default once more; one that is slower is recorded as it was found."""
        best, default = self.search.best, self.search.tried[self.search.default]
        if not found or best is None:
            raise TuneError(f"the default of {self.problem.text} {default.outcome.status}: "
                            f"{default.outcome.message}")
        if self.default_seconds != self.default_seconds:  # nan: the default was recalled, not measured
            self.default_seconds = default.outcome.hot
        if best.recipe != self.search.default:
            outcome = self.tuner.worker.run(self.job(self.text(best.recipe), self.text(self.search.default)))
            speed = 1 / outcome.ratio if outcome.status == "ok" else 0.0
            known = self.known[self.text(best.recipe)]
            self.tuner.cache.put(replace(known, hot=self.default_seconds / max(speed, 1e-9),
                                         time=self.tuner.clock()))
            best = replace(best, speed=speed) if speed > 1 else default
        self.mark(self.search.complete)
        return Tuned(self.problem, parse_schedule(self.text(best.recipe)), repr(best.recipe), best.speed,
                     self.default_seconds, self.measured, self.failures, self.search.complete)

    def mark(self, complete: bool) -> None:
        self.tuner.cache.mark_run(self.key, complete, str(self.budget), self.measured, self.tuner.clock())


def _recalled(before: Record, other: Record) -> Outcome:
    """A candidate measured in an earlier run, relative to the incumbent's record of the same scale."""
    nan = float("nan")
    return Outcome(before.status, before.message, before.hot or nan, other.hot or nan, before.cold or nan,
                   before.spread or 0.0, before.samples, before.error or 0.0, before.workspace)


def tune(layer: Problem, *, budget: str = "10s", threads: int | None = None, layout: str = "nchw",
         accuracy: str = "normal", cache: ScheduleCache | None = None) -> Tuned:
    """Search the best schedule of a layer on this machine and remember it for ``compile``.

    ``budget``: a time ("10s", "2m") or "100 candidates". The analytic default is measured first, so that
    the result is never slower. Every candidate is checked against a float64 oracle before it is timed.
    Raises TuneError.
    """
    with Tuner(cache or ScheduleCache(), threads or default_threads(), layout, accuracy) as tuner:
        return tuner.tune(layer, Budget.parse(budget))


def shares(problems: Sequence[tuple[Problem, int]], seconds: float) -> list[float]:
    """The seconds of a network's budget that each distinct layer gets: half evenly, half by its work."""
    work = [count * problem.macs for problem, count in problems]
    total = sum(work) or 1
    return [seconds * (0.5 / len(work) + 0.5 * w / total) for w in work]
