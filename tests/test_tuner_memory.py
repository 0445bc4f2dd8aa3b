"""Memory of the tuning process and of its workers stays flat, however many candidates are measured."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

import convsched as cs
from convsched.autotune.measure.calibrate import LEVELS, Calibration
from convsched.autotune.search import tuner as tuning
from convsched.autotune.search.budget import Budget, Progress
from convsched.autotune.search.domain import Choice
from convsched.autotune.search.space import candidates
from convsched.autotune.search.tuner import Tuner
from convsched.autotune.store.cache import ScheduleCache
from convsched.machine import host
from convsched.plan.plan import Target

MIB = 1 << 20
OWN, WORKERS = 8 * MIB, 48 * MIB  # that the processes may grow: code is freed, the compiler keeps some pools
LAYER = cs.Conv2d(16, 16, 3, padding=1, input_size=8, activation="relu")


def resident(pid: int | None) -> int:
    """Bytes of a process in memory."""
    line = next(text for text in Path(f"/proc/{pid or 'self'}/status").read_text().splitlines() if "VmRSS" in text)
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_is_flat(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dict.fromkeys(LEVELS, 50e9)
    known = Calibration("test", 100e9, rates, rates, 1e-5, 0.0, ())
    monkeypatch.setattr(tuning, "calibration", lambda: known)
    monkeypatch.setattr("convsched.plan.plan.apply", lambda program, schedule: program)  # the worker sees what is legal
    monkeypatch.setattr(tuning, "MOST_FAILURES", 1.0)

    def everything(target: Target, recipe: Choice) -> tuple[Choice, ...]:
        return candidates(LAYER, target)

    monkeypatch.setattr(tuning, "neighbours", everything)
    own: list[int] = []
    workers: list[int] = []

    def watch(progress: Progress) -> None:
        own.append(resident(None))
        workers.append(resident(tuner.worker.pid))

    with Tuner(ScheduleCache(tmp_path / "schedules.sqlite"), Target(host.machine()), report=watch) as tuner:
        tuned = tuner.tune(LAYER, Budget(candidates=count))
    assert tuned.tried == len(own) == count
    tenth = count // 10
    for sizes, growth in ((own, OWN), (workers, WORKERS)):
        early, late = sizes[tenth:2 * tenth], sizes[-tenth:]
        assert statistics.median(late) <= statistics.median(early) + growth
    assert max(workers) <= statistics.median(workers[tenth:2 * tenth]) + WORKERS


def test_the_machine_of_the_test_is_the_tuners() -> None:
    assert len(candidates(LAYER, Target(host.machine()))) > 1000
