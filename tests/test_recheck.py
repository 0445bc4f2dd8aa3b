"""Stored winners that are checked again: the verdicts, what is forgotten, the budget, and the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.recheck import Check, recheck, winners
from convsched.autotune.store.record import Key, Record
from convsched.autotune.workers import worker as worker_module
from convsched.autotune.workers.candidate import Job, Outcome
from convsched.autotune.workers.worker import Worker
from convsched.cli.verify import verify
from convsched.machine import host
from convsched.plan.defaults import default_recipe
from convsched.plan.plan import Target
from convsched.problem import Conv2d

PROBLEM = Conv2d(4, 8, 3, padding=1, input_size=6)
KEY = Key.of(PROBLEM, Target(host.machine()))
DEFAULT = default_recipe(PROBLEM, host.machine(), "nchw", 1).schedule(PROBLEM, "nchw").text


def make(schedule: str, hot: float, key: Key = KEY, **values: Any) -> Record:
    given = {**vars(key), "algorithm": "direct", "status": "ok", "time": 1.0, **values}
    return Record(schedule=schedule, hot=hot, **given)


class FakeWorker:
    """Gives a schedule's outcomes in turn, the last of them for ever; a speed-up stands for a good one."""

    def __init__(self, outcomes: dict[str, list[float | Outcome]]) -> None:
        self.outcomes, self.jobs = outcomes, list[Job]()

    def run(self, job: Job) -> Outcome:
        self.jobs.append(job)
        outcomes = self.outcomes[job.plan.schedule.text]
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        if isinstance(outcome, Outcome):
            return outcome
        alone = job.incumbent in (None, job.plan)
        return Outcome("ok", hot=1.0 / outcome, incumbent=nan if alone else 1.0, spread=0.01, samples=20)

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path) -> ScheduleCache:
    """A default of 2 s, and a winner of 1 s."""
    cache = ScheduleCache(tmp_path / "schedules.sqlite")
    cache.put(make(DEFAULT, 2.0, is_default=True))
    cache.put(make("unroll c", 1.0))
    return cache


def checks(cache: ScheduleCache, *outcomes: float | Outcome, **options: Any) -> list[Check]:
    run = FakeWorker({"unroll c": [*outcomes], "unroll m": [1.5], DEFAULT: [1.0]}).run
    return list(recheck(cache, winners(cache, host.machine()), run, **options))


@pytest.mark.parametrize(
    ("outcome", "verdict", "bad"),
    [
        (2.0, "good", False),
        (1.85, "good", False),
        (2.15, "good", False),
        (1.5, "changed", False),
        (3.0, "changed", False),
        (0.985, "changed", False),  # within the noise of the default
        (0.95, "slower", True),
        (Outcome("ok", hot=1 / 0.95, incumbent=1.0, spread=0.1), "changed", False),  # so is this, by its spread
        (Outcome("wrong", "max |error| / rms is 1"), "wrong", True),
        (Outcome("crashed", "the process ended with -11"), "crashed", True),
        (Outcome("timed out", "no answer in 60 s"), "timed out", True),
        (Outcome("failed", "ScheduleError: unroll c: there is no such loop"), "failed", True),
    ],
    ids=str,
)
def test_verdicts(cache: ScheduleCache, outcome: float | Outcome, verdict: str, bad: bool) -> None:
    (check,) = checks(cache, outcome)
    assert (check.verdict, check.is_bad, check.then) == (verdict, bad, 2.0)
    assert isnan(check.now) == (verdict in ("wrong", "crashed", "timed out", "failed"))
    assert cache.best(KEY) is not None


def test_the_winner_is_run_in_turn_with_the_default(cache: ScheduleCache) -> None:
    worker = FakeWorker({"unroll c": [2.0]})
    list(recheck(cache, winners(cache, host.machine()), worker.run))
    assert worker.jobs == [Job(make("unroll c", 1.0).plan(host.machine()), make(DEFAULT, 1.0).plan(host.machine()))]


def test_a_bad_verdict_needs_a_second_run(cache: ScheduleCache) -> None:
    crashed = Outcome("crashed", "killed")
    assert [check.verdict for check in checks(cache, crashed, 2.0)] == ["good"]
    assert [check.verdict for check in checks(cache, 0.5, crashed)] == ["crashed"]
    worker = FakeWorker({"unroll c": [crashed]})
    list(recheck(cache, winners(cache, host.machine()), worker.run))
    assert [str(job.incumbent and job.incumbent.schedule) for job in worker.jobs] == [DEFAULT, "None"]


def test_a_default_that_fails_is_not_the_winners_fault(cache: ScheduleCache) -> None:
    (check,) = checks(cache, Outcome("failed", "the default cannot be compiled"), 2.0, forget=True)
    assert (check.verdict, isnan(check.now)) == ("good", True)
    assert len(cache.records(KEY)) == 2


def test_a_default_that_wins_is_checked_alone(cache: ScheduleCache) -> None:
    cache.forget(winners(cache, host.machine()))
    (check,) = checks(cache)
    assert (check.record.schedule, check.then, check.verdict) == (DEFAULT, 1.0, "good")
    assert isnan(check.now)


def test_another_default_does_not_compare(cache: ScheduleCache) -> None:
    cache.forget(cache.records(KEY))
    cache.put(make("unroll m", 2.0, is_default=True))  # an earlier version's
    cache.put(make("unroll c", 1.0))
    (check,) = checks(cache, 1.1)
    assert (check.then, check.now, check.verdict) == (None, 1.1, "good")


def test_forgetting_goes_on_to_what_is_good(cache: ScheduleCache) -> None:
    cache.put(make("unroll m", 4 / 3))
    found = checks(cache, 0.5, forget=True)
    assert [(check.record.schedule, check.verdict) for check in found] == [("unroll c", "slower"), ("unroll m", "good")]
    assert {record.schedule for record in cache.records(KEY)} == {DEFAULT, "unroll m"}


def test_what_is_all_bad_becomes_a_miss(cache: ScheduleCache) -> None:
    wrong = Outcome("wrong", "max |error| / rms is 1")
    run = FakeWorker({"unroll c": [wrong], DEFAULT: [wrong]}).run
    assert len(list(recheck(cache, winners(cache, host.machine()), run, forget=True))) == 2
    assert cache.best(KEY) is None


def test_a_cache_that_cannot_forget_ends_it(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "forget", lambda records: False)
    assert len(checks(cache, 0.5, forget=True)) == 1


def test_a_record_whose_default_cannot_be_made_is_bad(cache: ScheduleCache) -> None:
    records = [make("unroll c", 1.0, replace(KEY, layout="nchw7c")), make("unroll c", 1.0)]
    bad, good = recheck(cache, records, FakeWorker({"unroll c": [2.0], DEFAULT: [1.0]}).run)
    assert bad.verdict == "failed"
    assert "nchw7c" in bad.outcome.message
    assert good.verdict == "good"


def test_winners_are_those_of_the_machine_and_layers(cache: ScheduleCache) -> None:
    here = host.machine()
    cache.put(make("unroll m", 1.0, replace(KEY, machine=Key.of(PROBLEM, Target(replace(here, cores=999))).machine)))
    cache.put(replace(make("unroll c", 1.0, replace(KEY, threads=2)), status="crashed", hot=None))
    assert winners(cache, here) == [make("unroll c", 1.0)]
    assert winners(cache, here, ["c=4", "nothing"]) == winners(cache, here)
    assert winners(cache, here, ["c=99"]) == []


def test_the_budget(cache: ScheduleCache) -> None:
    cache.put(make("unroll c", 1.0, replace(KEY, threads=2)))
    assert len(checks(cache, 2.0)) == 2
    assert len(checks(cache, 2.0, spent=lambda: True)) == 1  # the first in any case


def test_a_real_worker(cache: ScheduleCache) -> None:
    cache.forget(winners(cache, host.machine()))
    cache.put(make("unroll nowhere", 0.5))
    with Worker() as worker:
        first, second = recheck(cache, winners(cache, host.machine()), worker.run, forget=True)
    assert (first.record.schedule, first.verdict) == ("unroll nowhere", "failed")
    assert "ScheduleError" in first.outcome.message
    assert (second.record.schedule, second.verdict, second.outcome.error) == (DEFAULT, "good", 0.0)
    assert [record.schedule for record in cache.records(KEY)] == [DEFAULT]


Run = Callable[..., Result]


@pytest.fixture
def run(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command with a worker of these outcomes."""

    def invoke(*arguments: str, outcomes: dict[str, list[float | Outcome]] | None = None) -> Result:
        worker = FakeWorker(outcomes or {"unroll c": [2.0], DEFAULT: [1.0]})
        monkeypatch.setattr(worker_module, "Worker", lambda: worker)
        return CliRunner().invoke(verify, [*arguments, "--cache", str(cache.path)])

    return invoke


def test_the_command(run: Run) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    row = next(line.split() for line in result.stdout.splitlines() if "direct" in line)
    assert row[-4:] == ["2.000", "2.000", "1.0%", "good"]
    assert result.stdout.endswith("1 of 1 winners checked, 0 bad\n")


def test_the_command_fails_for_a_bad_winner(run: Run, cache: ScheduleCache) -> None:
    wrong: dict[str, list[float | Outcome]] = {"unroll c": [Outcome("wrong", "max [error]")], DEFAULT: [1.0]}
    result = run(outcomes=wrong)
    assert (result.exit_code, "wrong: max [error]" in result.stdout) == (1, True)
    assert "1 of 1 winners checked, 1 bad\n" in result.stdout
    assert len(cache.records(KEY)) == 2
    assert run("--forget", outcomes=wrong).exit_code == 1
    assert [record.schedule for record in cache.records(KEY)] == [DEFAULT]
    assert run("--forget", outcomes=wrong).exit_code == 0


def test_the_command_stops_at_its_budget(run: Run, cache: ScheduleCache) -> None:
    cache.put(make("unroll c", 1.0, replace(KEY, threads=2)))
    result = run("--budget", "1 candidates")
    assert (result.exit_code, "1 of 2 winners checked, 0 bad; the budget is spent" in result.stdout) == (0, True)
    assert "2 of 2 winners checked" in run("--budget", "2 candidates").stdout
    assert "budget 'soon': write a time" in run("--budget", "soon").output


def test_the_command_keeps_what_it_has_when_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: FakeWorker, job: Job) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeWorker, "run", interrupt)
    result = run()
    assert (result.exit_code, "0 of 1 winners checked, 0 bad; interrupted" in result.stdout) == (130, True)


def test_the_command_without_winners(run: Run, cache: ScheduleCache) -> None:
    result = run("--layer", "c=99", "--layer", "c=98")
    assert result.exit_code == 1
    assert result.stdout == f"no winner of this machine in {cache.path} is for 'c=99' or 'c=98'\n"
    cache.path.unlink()
    assert run().stdout == f"no winner of this machine in {cache.path}\n"
    assert run().exit_code == 0
