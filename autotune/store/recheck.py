"""Whether what the schedule cache holds is still true: stored winners, checked and timed again.

A winner is run in turn with the default that `compile` would take without it. Its seconds of then and now do
not compare, since a machine drifts; its speed-up over the default does:

    speed-up = seconds of the default / seconds of the winner,    both of one run

A verdict against a winner is only believed when a second run confirms it: for one that failed a run alone,
since the failure may be the default's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Record, Status
from convsched.autotune.store.winner import TIE_FRACTION
from convsched.autotune.workers.candidate import Job, Outcome
from convsched.errors import ConvschedError
from convsched.machine import Machine, host, machine_key
from convsched.plan.choice import choose
from convsched.plan.plan import Plan

Verdict: TypeAlias = Literal["good", "changed", "slower"] | Status

CHANGED_FRACTION = 0.1  # of the speed-up: a greater difference is reported, but the winner is still one


@dataclass(frozen=True)
class Check:
    """A stored winner, and what it did now: `then` is its speed-up over the default as recorded, None where
    this default was not measured with it."""

    record: Record
    outcome: Outcome
    then: float | None = None

    @property
    def now(self) -> float:
        """The speed-up over the default; nan for a failure, and for one that ran alone, as the default does."""
        return 1 / self.outcome.ratio

    @property
    def verdict(self) -> Verdict:
        """How it ended if it failed; slower than the default beyond the noise; a changed speed-up; or good."""
        if self.outcome.status != "ok":
            return self.outcome.status
        noise = max(TIE_FRACTION, self.outcome.spread)
        if self.now < 1 / (1 + noise):
            return "slower"
        changed = self.then is not None and abs(self.now / self.then - 1) > max(CHANGED_FRACTION, noise)
        return "changed" if changed else "good"

    @property
    def is_bad(self) -> bool:
        """Whether `compile` does better without this record."""
        return self.verdict not in ("good", "changed")


def winners(cache: ScheduleCache, machine: Machine, layers: Sequence[str] = ()) -> list[Record]:
    """The stored winners of a machine, or those with one of these texts in their problem's."""
    here = machine_key(machine)
    found = [entry.winner for entry in cache.entries() if entry.key.machine == here and entry.winner]
    return [record for record in found if not layers or any(text in record.problem for text in layers)]


def recheck(cache: ScheduleCache, records: Sequence[Record], run: Callable[[Job], Outcome],
            spent: Callable[[], bool] = lambda: False, forget: bool = False) -> Iterator[Check]:  # fmt: skip
    """Check winners one after another with a worker's `run`, the first in any case, until `spent()`.

    With `forget`, a bad one is removed from the cache, and the next best of its key is checked in its place;
    so what is left is good, or a miss.
    """
    for i, winner in enumerate(records):
        record: Record | None = winner
        while record is not None and not (i and spent()):
            yield (check := _check(cache, record, run))
            if not (forget and check.is_bad and cache.forget([record])):
                break
            hit = cache.best(record.key, furthest="exact")
            record = hit.record if hit and not spent() else None


def _check(cache: ScheduleCache, record: Record, run: Callable[[Job], Outcome]) -> Check:
    try:
        plan = record.plan(host.machine())
        default = Plan.of(choose(plan.problem, plan.target), plan.target)
    except ConvschedError as error:
        return Check(record, Outcome("failed", str(error).splitlines()[0]))
    stored = {(other.algorithm, other.schedule): other.hot for other in cache.records(record.key)}
    seconds = stored.get((default.algorithm.name, default.schedule.text))
    then = seconds / record.hot if seconds and record.hot else None
    job = Job(plan, default)
    check = Check(record, run(job), then)
    if not check.is_bad:
        return check
    return Check(record, run(job if check.verdict == "slower" else Job(plan)), then)
