"""Tuning end to end on small layers: real candidates, a real worker, a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import convsched as cs
from convsched.autotune import tune as tuning
from convsched.autotune.cache import ScheduleCache
from convsched.autotune.calibrate import LEVELS, Calibration
from convsched.autotune.record import Key
from convsched.autotune.tune import Budget, Progress, Tuner
from convsched.cli import main
from convsched.machine import Machine

LAYER = cs.Conv2d(16, 16, 1, input_size=(6, 6), activation="relu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScheduleCache:
    rates = dict.fromkeys(LEVELS, 50e9)
    known = Calibration("test", 100e9, rates, rates, 1e-5, 0.0, ())
    monkeypatch.setattr(tuning, "calibration", lambda: known)
    return ScheduleCache(tmp_path / "schedules.sqlite")


def key() -> Key:
    return Key.of(LAYER, Machine.host())


def test_candidates_are_kept_and_recalled(cache: ScheduleCache) -> None:
    with Tuner(cache, threads=1) as tuner:
        first = tuner.tune(LAYER, Budget(candidates=6))
        records = cache.records(key())
        again = tuner.tune(LAYER, Budget(candidates=6))
    assert first.speed >= 1
    assert first.tried == 6
    assert len(records) == 6
    assert sum(record.is_default for record in records) == 1
    assert all(record.status == "ok" and record.error == 0 for record in records)
    assert {r.schedule for r in records} < {r.schedule for r in cache.records(key())}  # new ones only
    assert again.tried == 6


def test_compile_takes_what_was_found(cache: ScheduleCache) -> None:
    with Tuner(cache, threads=1) as tuner:
        tuner.tune(LAYER, Budget(candidates=4))
    hit = cache.best(key())
    assert hit is not None
    assert cs.compile(LAYER, threads=1, cache=cache).schedule.text == hit.record.schedule
    assert cs.compile(LAYER, threads=1, cache=False).recipe is not None  # the analytic default


def test_an_interrupted_run_keeps_what_it_measured(cache: ScheduleCache) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.tried == 3:
            raise KeyboardInterrupt

    with Tuner(cache, threads=1, report=interrupt) as tuner, pytest.raises(KeyboardInterrupt):
        tuner.tune(LAYER, Budget(candidates=10))
    assert len(cache.records(key())) == 3
    run = cache.run_of(key())
    assert run is not None
    assert not run.complete


def test_the_command_prints_a_total(cache: ScheduleCache) -> None:
    arguments = ["tune", "lenet5", "--layer", "linear", "--budget", "6 candidates", "--cache", str(cache.path)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "with the defaults" in done.output
    assert len(cache.entries()) == 3
