"""Candidates in a process of their own: what one does wrong costs one candidate."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convsched.analytic import default_recipe
from convsched.autotune import worker as module
from convsched.autotune.worker import Job, Outcome, Worker, WorkerError, run_job
from convsched.machine import Machine
from convsched.problem import Conv2d

PROBLEM = Conv2d(4, 8, 3, padding=1, input_size=6)
DEFAULT = default_recipe(PROBLEM, Machine.host()).schedule(PROBLEM).text
GOOD = Job(PROBLEM.text, "nchw", 1, DEFAULT)

# A worker that obeys these schedules, and runs all others. It is a file, for a spawned process to import.
FAULTY = '''
import os, signal, time
from convsched.autotune import worker

def obey(job, run=worker.run_job):
    match job.schedule:
        case "segfault": os.kill(os.getpid(), signal.SIGSEGV)
        case "hang": time.sleep(600)
        case "pid": return worker.Outcome("ok", str(os.getpid()))
        case _: return run(job)

def serve(connection):
    worker.run_job = obey
    worker.serve(connection)

def die(connection):
    connection.close()
'''


def job(schedule: str) -> Job:
    return Job(PROBLEM.text, "nchw", 1, schedule)


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "faulty_worker.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    run = module.run_job
    yield importlib.import_module("faulty_worker")
    assert module.run_job is run


def test_a_real_worker() -> None:
    with Worker() as worker:
        good = worker.run(GOOD)
        assert (good.status, good.error) == ("ok", 0.0)
        assert good.hot > 0
        bad = worker.run(job("split nowhere by 3 into a b"))
        assert bad.status == "failed"
        assert "Error: " in bad.message
        assert worker.run(Job(PROBLEM.text, "nchw", 1, "", DEFAULT)).ratio > 0


def test_crashes_hangs_and_replacement(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker(target=faulty.serve) as worker:
        first = worker.run(job("pid"))
        crashed = worker.run(job("segfault"))
        assert (crashed.status, crashed.message) == ("crashed", "the process ended with -11")
        second = worker.run(job("pid"))
        assert second.status == "ok"
        assert second != first
        worker.timeout = 0.3
        hung = worker.run(job("hang"))
        assert (hung.status, hung.message) == ("timed out", "no answer in 0.3 s")
        worker.timeout = 60.0
        monkeypatch.setattr(module, "JOBS_PER_PROCESS", 2)
        seen = [worker.run(job("pid")).message for _ in range(4)]
        assert seen[0] == seen[1] != seen[2] == seen[3]


def test_a_worker_that_does_not_start(faulty: Any) -> None:
    with Worker(target=faulty.die) as worker, pytest.raises(WorkerError, match="__main__"):
        worker.run(GOOD)


def test_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    true: Callable[[str], tuple[Any, ...]] = module._data.__wrapped__

    def spoiled(problem: str) -> tuple[Any, ...]:
        *arrays, expected = true(problem)
        return (*arrays, expected + np.eye(*expected.shape[2:]))

    monkeypatch.setattr(module, "_data", spoiled)
    module._prepared.cache_clear()
    try:
        outcome = run_job(GOOD)
    finally:
        module._prepared.cache_clear()
    assert outcome.status == "wrong"
    assert outcome.error > 0
    assert np.isnan(outcome.hot)


@pytest.mark.parametrize(("error", "message"), [(MemoryError(), "MemoryError"), (KeyError("x"), "KeyError: 'x'"),
                                                (RuntimeError("a\nb"), "RuntimeError: a")])
def test_any_error_of_a_candidate_is_its_outcome(error: Exception, message: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Job) -> Outcome:
        raise error

    monkeypatch.setattr(module, "_run", fail)
    assert (run_job(GOOD).status, run_job(GOOD).message) == ("failed", message)
