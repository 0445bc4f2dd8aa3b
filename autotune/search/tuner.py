"""A measured search for each layer, candidate by candidate: ranked, timed in turn, recorded.

Times of one run are kept relative to the default of that run: a record's ``hot`` is the default's time
divided by the candidate's measured speed-up, so that records compare although the machine drifts. A later run
goes on from the records: what has been measured is not measured again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from convsched.autotune.measure.calibrate import calibration
from convsched.autotune.measure.measure import now
from convsched.autotune.search.budget import Budget, Progress, Records, Tuned, TuneError
from convsched.autotune.search.domain import Choice
from convsched.autotune.search.search import Measured, Search
from convsched.autotune.search.space import candidates, neighbours, seeds
from convsched.autotune.store.record import Key, Record
from convsched.autotune.store.winner import choose
from convsched.autotune.workers.candidate import Job, Outcome
from convsched.autotune.workers.worker import Worker
from convsched.errors import ConvschedError, LoweringError
from convsched.model.cost import Rates, cost
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Problem
from convsched.schedule import parse_schedule

MOST_FAILURES = 0.5  # of the candidates; more, and the search says so instead of going on
LEAST_TRIES = 8  # before the share of failures means something
RANKING_SHARE = 0.1  # of the seconds of a search, for the model to order candidates
PATIENCE_RATIO = 10.0  # times the seconds of the default, from compiling to timing, and at the least seconds: a job's


@dataclass
class Tuner:
    """Tunes problems one after another for a target, with one worker process; a context manager.

    Candidates are of all algorithms whose predicted error fits the target's accuracy, or of one, by its name.
    """

    cache: Records
    target: Target
    algorithm: str | None = None
    report: Callable[[Progress], None] = lambda _: None
    clock: Callable[[], float] = now

    def __post_init__(self) -> None:
        self.rates = Rates.of(calibration())
        self.worker = Worker()
        self._writer = ThreadPoolExecutor(1, "convsched-records")
        self._writing: Future[object] | None = None
        self.begin(Budget())

    def __enter__(self) -> Tuner:
        self.worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()
        self._writer.shutdown()

    def begin(self, budget: Budget) -> None:
        """Start to spend a budget."""
        self.budget, self.measured, self._start = budget, 0, self.clock()

    @property
    def left(self) -> Budget:
        """What is left of the budget."""
        return Budget(self.budget.seconds - (self.clock() - self._start), self.budget.candidates - self.measured)

    def keep(self, record: Record) -> None:
        """Put a record into the cache while the worker goes on: that takes as long as a disk takes to sync."""
        self.settle()
        self._writing = self._writer.submit(self.cache.put, record)

    def settle(self) -> None:
        """Wait until the latest record is in the cache; raises what putting it there raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def tune(self, problem: Problem, budget: Budget) -> Tuned:
        """Search one problem; every candidate is in the cache before the next is measured. Raises TuneError."""
        self.begin(budget)
        search = LayerSearch(self, problem)
        try:
            search.run_default()
            search.run(self.left)
            return search.finish()
        except (KeyboardInterrupt, ConvschedError):
            search.mark(complete=False)
            raise


class LayerSearch:
    """The search of one problem, tied to the worker and the cache; it can be run bit by bit."""

    def __init__(self, tuner: Tuner, problem: Problem) -> None:
        self.tuner, self.problem = tuner, problem
        self.target = tuner.target
        self.key = Key.of(problem, self.target)
        self.known = {record.schedule: record for record in tuner.cache.records(self.key)}
        self.failures = Counter(_reason(r) for r in self.known.values() if r.status != "ok" and r.is_settled)
        self.measured = 0
        self._verified = set[str]()
        self._job_seconds: float | None = None
        self._ranking = 0.0
        try:
            self._only = None if tuner.algorithm is None else named(tuner.algorithm, problem)
            space = candidates(problem, self.target, self._only)
        except LoweringError as error:
            raise TuneError(str(error)) from error
        self._search = Search(space[0], space, lambda r: neighbours(self.target, r), self._measure,
                              self._estimate, lambda: self._left.is_spent, self._may_rank,
                              seeds(problem, self.target, self._only))
        self._deadline = self._most = self._ranking_limit = 0.0

    @property
    def complete(self) -> bool:
        """Whether the search came to its end."""
        return self._search.complete

    @property
    def default(self) -> Record:
        """The default's record, once it is measured."""
        return self.known[self._text(self._search.default)]

    @property
    def default_seconds(self) -> float:
        """A call with the default."""
        assert self.default.hot is not None
        return self.default.hot

    def run_default(self) -> None:
        """Measure the default, unless its time is known, and take up what earlier runs have measured. Raises
        TuneError for a default that does not run."""
        before = self.known.get(self._text(self._search.default))
        if before is not None and before.status == "ok":
            self._search.recall([self._recalled(self._search.default, before)])
        outcome = self._search.run_default().outcome
        if outcome.status != "ok":
            raise TuneError(f"the default of {self.problem.text} {_reason(outcome)}")
        choices = {(choice.algorithm.name, repr(choice.recipe)): choice for choice in self._search.space}
        self._search.recall(self._recalled(choice, record) for record in self.known.values()
                            if (choice := choices.get((record.algorithm, record.recipe))) and record is not self.default
                            and record.is_settled and self._text(choice) == record.schedule)
        run = self.tuner.cache.run_of(self.key)
        self._search.recall((), complete=run is not None and run.complete)

    def run(self, share: Budget) -> None:
        """Search on, within a share of the budget. Raises TuneError if most candidates fail."""
        self._deadline = self.tuner.clock() + share.seconds
        self._most = self.measured + share.candidates
        self._ranking_limit = self._ranking + RANKING_SHARE * share.seconds
        self._search.run()

    def finish(self) -> Tuned:
        """Time in turn with the default what the cache would give, until that is a schedule so timed or the
        default itself: what was only lucky when it was measured is recorded as it is."""
        self._measure_usual()
        while (chosen := choose(self._allowed())) and chosen != self.default:
            if chosen.schedule in self._verified:
                break
            self._verified.add(chosen.schedule)
            outcome = self._run(chosen.plan(self.target.machine), self.default)
            self._keep(chosen, outcome, self.default, chosen.time)  # a later run takes up records in their order
        assert chosen is not None
        assert chosen.hot is not None
        self.mark(self.complete)
        return Tuned(self.problem, parse_schedule(chosen.schedule), chosen.recipe,
                     self.default_seconds / chosen.hot, self.default_seconds, self.measured, dict(self.failures),
                     self.complete)

    def _allowed(self) -> list[Record]:
        """The records of the algorithms that are searched."""
        return [record for record in self.known.values() if not self._only or self._only.name == record.algorithm]

    def _measure_usual(self) -> None:
        """Where only one algorithm is searched, measure also what ``compile`` takes where nothing is stored: else it
        would take the best of that algorithm from then on, although another one's default is faster."""
        if self._only is not None:
            usual = candidates(self.problem, self.target)[0]
            if self._text(usual) not in self.known:
                self._measure(usual, self._search.tried[self._search.default])

    def mark(self, complete: bool) -> None:
        """Record how the run ended."""
        self.tuner.settle()
        self.tuner.cache.mark_run(self.key, complete, str(self.tuner.budget), self.measured, self.tuner.clock())

    @property
    def _left(self) -> Budget:
        """What is left of the share."""
        return Budget(self._deadline - self.tuner.clock(), self._most - self.measured)

    def _may_rank(self) -> bool:
        return self._ranking < self._ranking_limit

    def _look_ahead(self) -> bool:
        """While the worker compiles, the model costs no time; while it measures, nothing may disturb it."""
        before = self._ranking
        looked = not self._left.is_spent and self._search.look_ahead()
        self._ranking = before
        return looked

    def _text(self, choice: Choice) -> str:
        return choice.plan(self.target).schedule.text

    def _estimate(self, choice: Choice) -> float | None:
        """The model's seconds; None for parameters that make no legal schedule."""
        start = self.tuner.clock()
        try:
            program = choice.plan(self.target).program
            return cost(program, self.target.machine, self.tuner.rates, self.target.threads).seconds
        except ConvschedError:
            return None
        finally:
            self._ranking += self.tuner.clock() - start

    def _measure(self, choice: Choice, incumbent: Measured | None) -> Measured:
        """By the worker, and recorded at once; what made the same schedule before is known. The default of
        another version is as good an incumbent as any."""
        plan = choice.plan(self.target)
        schedule = plan.schedule.text
        before = self.known.get(schedule)
        if incumbent and before and before.is_settled:
            return self._recalled(choice, before)
        against = self.known[incumbent.schedule] if incumbent else choose(self.known.values())
        outcome = self._run(plan, against, self._look_ahead)
        self.measured += 1
        self.tuner.measured += 1
        record = Record(
            **vars(self.key), algorithm=choice.algorithm.name, recipe=repr(choice.recipe), schedule=schedule,
            status=outcome.status, is_default=incumbent is None,
            tries=before.tries + 1 if before else 1, time=self.tuner.clock())
        measured = self._recalled(choice, self._keep(record, outcome, against))
        self._count(outcome)
        return measured

    def _run(self, plan: Plan, against: Record | None, meanwhile: Callable[[], bool] = lambda: False) -> Outcome:
        """A job for the worker. None takes much longer than the first, which prepares data as well."""
        job = Job(plan, against.plan(self.target.machine) if against else None)
        start = self.tuner.clock()
        patience = None if self._job_seconds is None else PATIENCE_RATIO * max(1.0, self._job_seconds)
        outcome = self.tuner.worker.run(job, patience, meanwhile)
        if self._job_seconds is None:
            self._job_seconds = self.tuner.clock() - start
        return outcome

    def _keep(self, record: Record, outcome: Outcome, against: Record | None, time: float | None = None) -> Record:
        """Record an outcome, on the scale of the incumbent's record; as measured at a ``time``, or now."""
        scale = against.hot / outcome.incumbent if against and against.hot else 1.0
        kept = replace(
            record, status=outcome.status, message=outcome.message, hot=outcome.hot * scale,
            cold=outcome.cold * scale, spread=outcome.spread, error=outcome.error, workspace=outcome.workspace,
            samples=outcome.samples, flags=outcome.flags,
            time=self.tuner.clock() if time is None else time)
        self.known[kept.schedule] = kept
        self.tuner.keep(kept)
        return kept

    def _recalled(self, choice: Choice, record: Record) -> Measured:
        """A record as the search sees it."""
        outcome = Outcome(record.status, record.message, workspace=record.workspace)
        default = self.known.get(self._text(self._search.default))
        speed = default.hot / record.hot if default and default.hot and record.hot else 1.0
        return Measured(choice, record.schedule, outcome, speed)

    def _count(self, outcome: Outcome) -> None:
        """Report, and stop a search in which most candidates fail."""
        if outcome.status != "ok":
            self.failures[_reason(outcome)] += 1
        failed, tried = self.failures.total(), len(self.known)
        best = self._search.best
        self.tuner.report(Progress(self.problem, outcome, best.speed if best else 1.0, tried, failed, self.tuner.left))
        if tried >= LEAST_TRIES and failed > MOST_FAILURES * tried:
            raise TuneError(f"{failed} of {tried} candidates of {self.problem.text} failed: "
                            + "; ".join(f"{n} x {reason}" for reason, n in self.failures.most_common()))


def _reason(failure: Record | Outcome) -> str:
    return f"{failure.status}: {failure.message}"
