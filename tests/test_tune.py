"""Tuning end to end: on small layers with a real worker, and with one that answers as it is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
from click.testing import CliRunner

import convsched as cs
from convsched.autotune.measure.calibrate import LEVELS, Calibration
from convsched.autotune.search import tuner as tuning
from convsched.autotune.search.budget import Budget, Progress, TuneError
from convsched.autotune.search.tuner import LEAST_TRIES, Tuner
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record
from convsched.autotune.store.winner import choose
from convsched.autotune.workers.candidate import Job, Outcome
from convsched.cli.main import main
from convsched.machine import host
from convsched.plan.plan import Target

LAYER = cs.Conv2d(16, 16, 1, input_size=(6, 6), activation="relu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScheduleCache:
    rates = dict.fromkeys(LEVELS, 50e9)
    known = Calibration("test", 100e9, rates, rates, 1e-5, 0.0, ())
    monkeypatch.setattr(tuning, "calibration", lambda: known)
    return ScheduleCache(tmp_path / "schedules.sqlite")


def key() -> Key:
    return Key.of(LAYER, Target(host.machine()))


def test_candidates_are_kept_and_recalled_and_compile_takes_the_best(cache: ScheduleCache) -> None:
    with Tuner(cache, Target(host.machine())) as tuner:
        first = tuner.tune(LAYER, Budget(candidates=4))
        records = cache.records(key())
        again = tuner.tune(LAYER, Budget(candidates=2))
    assert first.speed >= 1
    assert first.tried == 4
    assert len(records) == 4
    assert sum(record.is_default for record in records) == 1
    assert all(record.status == "ok" and record.error == 0 for record in records)
    assert {r.schedule for r in records} < {r.schedule for r in cache.records(key())}  # new ones only
    assert again.tried == 2
    hit = cache.best(key())
    assert hit is not None
    assert cs.compile(LAYER, threads=1, cache=cache).schedule.text == hit.record.schedule
    assert cs.compile(LAYER, threads=1, cache=False).recipe is not None  # the analytic default


def test_an_interrupted_run_keeps_what_it_measured(cache: ScheduleCache) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.tried == 2:
            raise KeyboardInterrupt

    with Tuner(cache, Target(host.machine()), report=interrupt) as tuner, pytest.raises(KeyboardInterrupt):
        tuner.tune(LAYER, Budget(candidates=10))
    assert len(cache.records(key())) == 2
    run = cache.run_of(key())
    assert run is not None
    assert not run.complete


class Lab:
    """A worker whose candidates take given seconds (default: 1), the first time perhaps others."""

    def __init__(self, seconds: Callable[[str], float] = lambda schedule: 1.0,
                 first: Callable[[str], float] | None = None,
                 failing: Callable[[str], bool] = lambda schedule: False) -> None:
        self.seconds, self.first, self.failing = seconds, first or seconds, failing
        self.jobs: list[Job] = []

    def start(self) -> None: ...

    def close(self) -> None: ...

    def run(self, job: Job, timeout: float | None, meanwhile: Callable[[], bool]) -> Outcome:
        seen = {earlier.plan.schedule for earlier in self.jobs}
        self.jobs.append(job)
        schedule = job.plan.schedule.text
        if job.incumbent and self.failing(schedule):
            return Outcome("crashed", "the process ended with 3")
        hot = (self.seconds if job.plan.schedule in seen else self.first)(schedule)
        incumbent = self.seconds(job.incumbent.schedule.text) if job.incumbent else float("nan")
        drift = 1 + len(self.jobs) / 7  # the machine gets slower: only times of one job compare
        return Outcome("ok", hot=hot * drift, incumbent=incumbent * drift, cold=2 * hot * drift, flags=("load",))


@contextmanager
def tuner_with(lab: Lab, cache: ScheduleCache, report: Callable[[Progress], None] = lambda _: None) -> Iterator[Tuner]:
    tuner = Tuner(cache, Target(host.machine()), report=report)
    tuner.worker = lab  # type: ignore[assignment]
    with tuner, pytest.MonkeyPatch.context() as patch:
        patch.setattr("convsched.plan.plan.apply", lambda program, schedule: program)  # all alike, quickly
        yield tuner


def varied(schedule: str) -> float:
    """Seconds from 0.9 to 1.1, whatever they depend on, the same in every process."""
    return 0.9 + sum(map(ord, schedule)) % 21 / 100


def test_what_is_returned_is_what_the_cache_gives(cache: ScheduleCache) -> None:
    lab = Lab(varied, first=lambda schedule: varied(schedule[::-1] + "lucky") - 0.3)
    with tuner_with(lab, cache) as tuner:
        tuned = tuner.tune(LAYER, Budget(candidates=40))
    hit = cache.best(key())
    assert hit is not None
    assert tuned.schedule.text == hit.record.schedule
    default = lab.jobs[0].plan.schedule.text
    finals = [job.plan.schedule.text for job in lab.jobs[40:]]
    assert len(finals) > 1  # lucky ones, found out
    assert len(set(finals)) == len(finals)
    assert all(job.incumbent == lab.jobs[0].plan for job in lab.jobs[40:])
    assert tuned.schedule.text in {default, *finals}
    assert tuned.speed == pytest.approx(varied(default) / varied(tuned.schedule.text))
    assert tuned.speed >= 1


def test_a_winner_that_turns_out_slower_is_not_chosen(cache: ScheduleCache) -> None:
    def true(schedule: str) -> float:
        return 1.0 if schedule == lab.jobs[0].plan.schedule.text else 1.2

    lab = Lab(true, first=lambda schedule: 1.0 if len(lab.jobs) == 1 else 0.7)
    with tuner_with(lab, cache) as tuner:
        tuned = tuner.tune(LAYER, Budget(candidates=5))
    assert len(lab.jobs) == 5 + 4
    assert tuned.speed == 1.0
    assert tuned.schedule.text == lab.jobs[0].plan.schedule.text
    hit = cache.best(key())
    assert hit is not None
    assert hit.record.is_default
    assert {round(r.hot, 6) for r in cache.records(key()) if r.hot and not r.is_default} == {
        round(1.2 * hit.record.hot, 6)} if hit.record.hot else False


def test_a_winner_that_fails_at_the_end_is_not_chosen(cache: ScheduleCache) -> None:
    lab = Lab(lambda schedule: 1.0 if schedule == lab.jobs[0].plan.schedule.text else 0.8,
              failing=lambda schedule: len(lab.jobs) == 4)  # the first job after three candidates
    with tuner_with(lab, cache) as tuner:
        tuned = tuner.tune(LAYER, Budget(candidates=3))
    assert [record.status for record in cache.records(key())].count("crashed") == 1
    assert tuned.schedule.text != lab.jobs[3].plan.schedule.text
    assert tuned.speed == pytest.approx(1.25)


def test_drift_does_not_change_records(cache: ScheduleCache) -> None:
    lab = Lab(varied)
    with tuner_with(lab, cache) as tuner:
        tuner.tune(LAYER, Budget(candidates=20))
    records = cache.records(key())
    (default,) = (record for record in records if record.is_default)
    for record in records:
        assert record.hot is not None
        assert default.hot is not None
        assert record.hot / default.hot == pytest.approx(varied(record.schedule) / varied(default.schedule))
        assert record.cold == pytest.approx(2 * record.hot)
        assert record.flags == ("load",)


def test_a_run_goes_on_where_the_last_one_stopped(cache: ScheduleCache) -> None:
    whole, bits = Lab(varied), Lab(varied)
    other = ScheduleCache(cache.path.with_name("other.sqlite"))
    with tuner_with(whole, other) as tuner:
        tuner.tune(LAYER, Budget(candidates=12))
    for _ in range(4):
        with tuner_with(bits, cache) as tuner:
            assert tuner.tune(LAYER, Budget(candidates=3)).tried == 3
    assert {r.schedule for r in cache.records(key())} == {r.schedule for r in other.records(key())}
    assert choose(cache.records(key())).schedule == choose(other.records(key())).schedule  # type: ignore[union-attr]


def test_a_complete_run_measures_nothing_again(cache: ScheduleCache) -> None:
    for again in (False, True):
        lab = Lab(varied)
        with tuner_with(lab, cache) as tuner:
            tuned = tuner.tune(LAYER, Budget(candidates=10_000))
        assert tuned.complete
        assert (tuned.tried == 0) is again
        assert len(lab.jobs) - tuned.tried <= 2  # the winner against the default
    run = cache.run_of(key())
    assert run is not None
    assert (run.complete, run.budget, run.tried) == (True, "10000 candidates", 0)


def test_a_default_of_another_version_is_the_incumbent_of_this_one(cache: ScheduleCache) -> None:
    with tuner_with(Lab(), cache) as tuner:
        tuner.tune(LAYER, Budget(candidates=1))
    (record,) = cache.records(key())
    path = cache.path.with_name("later.sqlite")
    later = ScheduleCache(path)
    later.put(replace(record, schedule="unroll c", recipe="Other()"))
    lab = Lab(lambda schedule: 0.5)
    with tuner_with(lab, later) as tuner:
        tuner.tune(LAYER, Budget(candidates=1))
    assert (lab.jobs[0].plan.schedule.text, str(lab.jobs[0].incumbent and lab.jobs[0].incumbent.schedule)) == (
        record.schedule, "unroll c")
    assert [r.hot for r in later.records(key())] == pytest.approx([record.hot, record.hot])


def test_failures_of_earlier_runs_count(cache: ScheduleCache) -> None:
    seen: list[Progress] = []
    lab = Lab(failing=lambda schedule: len(lab.jobs) in (3, 4))
    with tuner_with(lab, cache) as tuner:
        first = tuner.tune(LAYER, Budget(candidates=8))
    assert first.failures == {"crashed: the process ended with 3": 2}
    # A crash is tried once more; then it is known.
    again = Lab(failing=lambda schedule: schedule in {job.plan.schedule.text for job in lab.jobs[2:4]})
    with tuner_with(again, cache, seen.append) as tuner:
        second = tuner.tune(LAYER, Budget(candidates=8))
    assert second.failures == first.failures
    last = Lab()
    with tuner_with(last, cache, seen.append) as tuner:
        third = tuner.tune(LAYER, Budget(candidates=1))
    assert third.failures == first.failures
    assert (seen[-1].failed, seen[-1].tried) == (2, len(cache.records(key())))
    assert not {job.plan.schedule.text for job in last.jobs} & {job.plan.schedule.text for job in lab.jobs[2:4]}


def test_a_search_in_which_most_fail_says_so(cache: ScheduleCache) -> None:
    lab = Lab(failing=lambda schedule: True)
    with tuner_with(lab, cache) as tuner, pytest.raises(TuneError, match=(
            f"{LEAST_TRIES - 1} of {LEAST_TRIES} candidates of conv2d .* failed: "
            f"{LEAST_TRIES - 1} x crashed: the process ended with 3")):
        tuner.tune(LAYER, Budget(candidates=100))
    run = cache.run_of(key())
    assert run is not None
    assert not run.complete


def test_a_default_that_fails_is_measured_again(cache: ScheduleCache) -> None:
    lab = Lab()
    lab.run = lambda *_: Outcome("timed out", "no answer in 60 s")  # type: ignore[method-assign]
    with tuner_with(lab, cache) as tuner, pytest.raises(TuneError, match=r"the default of .* timed out: no answer"):
        tuner.tune(LAYER, Budget(candidates=3))
    with tuner_with(Lab(), cache) as tuner:
        assert tuner.tune(LAYER, Budget(candidates=3)).tried == 3


def test_what_the_cache_says_stops_the_run(cache: ScheduleCache) -> None:
    class Refusing:
        def records(self, key: Key) -> tuple[Record, ...]:
            return ()

        def put(self, record: Record) -> None:
            raise TuneError("stopped by the caller")

        def mark_run(self, key: Key, complete: bool, budget: str, tried: int, time: float) -> None: ...

        def run_of(self, key: Key) -> None: ...

    lab = Lab()
    with tuner_with(lab, Refusing()) as tuner, pytest.raises(TuneError, match="stopped"):  # type: ignore[arg-type]
        tuner.tune(LAYER, Budget(candidates=9))
    assert len(lab.jobs) <= 2


def test_the_model_does_not_eat_a_small_budget(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0

    def slow(*arguments: object) -> object:
        nonlocal seconds
        seconds += 1.0
        return cost(*arguments)  # type: ignore[arg-type]

    def measured(schedule: str) -> float:
        nonlocal seconds
        seconds += 1.0
        return 1.0

    cost = tuning.cost
    monkeypatch.setattr(tuning, "cost", slow)
    lab = Lab(measured)
    tuner = Tuner(cache, Target(host.machine()), clock=lambda: seconds)
    tuner.worker = lab  # type: ignore[assignment]
    with tuner:
        tuned = tuner.tune(LAYER, Budget(seconds=30))
    assert tuned.tried >= 7  # each after one look; ranking all of them first would take the 30 s


# A script that tunes without `if __name__ == "__main__"`, until it is interrupted.
SCRIPT = """
import sys
from pathlib import Path
import convsched as cs
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.search.budget import Budget
from convsched.autotune.search.tuner import Tuner
from convsched.machine import host
from convsched.plan.plan import Target
cache, target = ScheduleCache(Path(sys.argv[1])), Target(host.machine())
with Tuner(cache, target, report=lambda p: print(p.tried, flush=True)) as tuner:
    tuner.tune(cs.Conv2d(16, 16, 1, input_size=6, activation="relu"), Budget(candidates=1000))
"""


def test_ctrl_c_stops_a_real_run_at_once(cache: ScheduleCache) -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(cache.path)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, start_new_session=True) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        threading.Event().wait(0.03)
        start = monotonic()
        os.killpg(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        taken = monotonic() - start
    assert process.returncode == -signal.SIGINT, errors
    assert taken < 10  # a second, on a machine with nothing else to do
    reported = len(lines) + len(rest.split())
    assert len(cache.records(key())) in (reported, reported + 1)
    run = cache.run_of(key())
    assert run is not None
    assert not run.complete


def test_the_command_prints_a_total(cache: ScheduleCache) -> None:
    arguments = ["tune", "lenet5", "--layer", "linear", "--budget", "2 candidates", "--cache", str(cache.path)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "with the defaults" in done.output
    assert len(cache.entries()) == 3
