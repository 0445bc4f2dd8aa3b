"""Candidates in a process of their own: what one does wrong costs one candidate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import IO

import pytest

from convsched.autotune.workers import worker as module
from convsched.autotune.workers.candidate import Job
from convsched.autotune.workers.worker import Worker, WorkerError
from convsched.machine import host
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d
from convsched.schedule import parse_schedule

PROBLEM = Conv2d(4, 8, 3, padding=1, input_size=6)
DEFAULT = Plan.of(named("direct", PROBLEM), Target(host.machine()))
GOOD = Job(DEFAULT)

# A process that obeys what the plan's origin says, and runs all others. It is a file, for the process to import.
FAULTY = '''
import os, signal, sys, time
from convsched.autotune.workers import candidate, worker
from convsched.autotune.workers.candidate import Outcome

def obey(job, compiled, run=candidate.run_job):
    match job.plan.origin.split():
        case ["segfault"]: os.kill(os.getpid(), signal.SIGSEGV)
        case ["abort"]:
            os.write(2, b"a warning\\nLLVM ERROR: cannot select\\n")
            os.abort()
        case ["exit"]: os._exit(3)
        case ["close"]: os.closerange(3, 64); time.sleep(600)
        case ["hang"]: time.sleep(600)
        case ["noise"]:
            print("x" * 1_000_000)
            os.write(1, b"y" * 1_000_000)
            os.write(2, b"z" * 1_000_000)
            return Outcome("ok", "quiet")
        case ["interrupt"]:
            os.kill(os.getpid(), signal.SIGINT)
            return Outcome("ok", "still here")
        case ["pid"]: return Outcome("ok", str(os.getpid()))
        case _: return run(job, compiled)

def main(descriptor):
    candidate.run_job = obey
    worker.main(descriptor)
'''


def job(order: str) -> Job:
    return Job(replace(DEFAULT, origin=order))


def scheduled(schedule: str) -> Plan:
    return replace(DEFAULT, schedule=parse_schedule(schedule))


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "faulty_worker.py").write_text(FAULTY)
    (tmp_path / "dead_worker.py").write_text("def main(descriptor): raise SystemExit('no compiler here')")
    monkeypatch.syspath_prepend(tmp_path)
    return "faulty_worker"


def is_gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within so many seconds; one that has ended may wait to be reaped."""
    end = monotonic() + seconds
    while monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        sleep(0.02)
    return False


def test_a_real_worker() -> None:
    with Worker() as worker:
        good = worker.run(GOOD)
        assert (good.status, good.error) == ("ok", 0.0)
        assert good.hot > 0
        assert good.cold > 0
        bad = worker.run(Job(scheduled("split nowhere 3 -> a b")))
        assert bad.status == "failed"
        assert "Error: " in bad.message
        assert worker.run(Job(scheduled(""), DEFAULT)).ratio > 0


def test_a_crash_costs_one_candidate(faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker(module=faulty) as worker:
        first = worker.run(job("pid"))
        for schedule, message in {
            "segfault": "the process was ended by signal 11 (Segmentation fault)",
            "abort": "the process was ended by signal 6 (Aborted): LLVM ERROR: cannot select",
            "exit": "the process ended with 3",
            "close": "the process closed its connection and went on",
        }.items():
            monkeypatch.setattr(module, "END_SECONDS", 0.3 if schedule == "close" else 30.0)
            crashed = worker.run(job(schedule))
            assert (crashed.status, crashed.message) == ("crashed", message)
            second = worker.run(job("pid"))
            assert second.status == "ok"
            assert second != first
            assert is_gone(int(first.message))
            first = second


def test_a_hang_costs_its_time(faulty: str) -> None:
    with Worker(module=faulty) as worker:
        first = worker.run(job("pid"))
        hung = worker.run(job("hang"), timeout=0.3)
        assert (hung.status, hung.message) == ("timed out", "no answer in 0.3 s")
        assert is_gone(int(first.message))
        assert worker.run(job("pid")).status == "ok"


def test_what_is_done_meanwhile_is_done_before_the_timing(faulty: str) -> None:
    calls: list[None] = []

    def meanwhile() -> bool:
        calls.append(None)
        sleep(0.001)
        return len(calls) < 3

    with Worker(module=faulty) as worker:
        assert worker.run(Job(scheduled("split m 2 -> m0 m1")), meanwhile=meanwhile).status == "ok"
        assert len(calls) <= 3
        calls.clear()
        assert worker.run(job("hang"), 0.3, meanwhile).status == "timed out"
        assert len(calls) == 3


def test_a_process_is_replaced_after_a_number_of_jobs(faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOBS_PER_PROCESS", 2)
    with Worker(module=faulty) as worker:
        seen = [worker.run(job("pid")).message for _ in range(6)]
    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4] == seen[5] != seen[0]


def test_what_a_candidate_prints_is_not_an_answer(faulty: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Worker(module=faulty) as worker:
        assert [worker.run(job("noise")).message for _ in range(2)] == ["quiet", "quiet"]
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_is_for_the_parent(faulty: str) -> None:
    with Worker(module=faulty) as worker:
        assert worker.run(job("interrupt")).message == "still here"


@pytest.mark.parametrize("name", ["dead_worker", "no_such_module"])
def test_a_worker_that_does_not_start(faulty: str, name: str) -> None:
    reason = {"dead_worker": "ended with 1: no compiler here",
              "no_such_module": "ended with 1: ModuleNotFoundError: No module named 'no_such_module'"}[name]
    with Worker(module=name) as worker:
        for _ in range(2):
            with pytest.raises(WorkerError, match=f"{reason}; .* -c 'import {name}' shows more"):
                worker.run(GOOD)


def test_a_python_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Worker() as worker, pytest.raises(WorkerError, match=r"cannot be started: .*No such file"):
        worker.run(GOOD)


def test_a_worker_that_is_never_ready(faulty: str, tmp_path: Path) -> None:
    (tmp_path / "slow_worker.py").write_text("import time\ndef main(descriptor): time.sleep(600)")
    with Worker(timeout=0.5, module="slow_worker") as worker, pytest.raises(WorkerError, match=r"not ready in 0.5 s"):
        worker.run(GOOD)


# A script without `if __name__ == "__main__"`, which prints its worker's number and waits for an end to a job.
SCRIPT = """
import sys
from convsched.autotune.workers.candidate import Job
from convsched.autotune.workers.worker import Worker
from convsched.machine import host
from convsched.plan.families import named
from convsched.plan.plan import Plan, Target
from convsched.problem import Conv2d
sys.path.insert(0, sys.argv[1])

def job(order):
    plan = Plan.of(named("direct", Conv2d(4, 8, 3, input_size=6)), Target(host.machine()))
    return Job(Plan(plan.problem, plan.target, plan.algorithm, plan.schedule, None, order))

with Worker(module="faulty_worker") as worker:
    print(worker.run(job("pid")).message, flush=True)
    worker.run(job("hang"))
"""


def script(folder: Path, then: Callable[[subprocess.Popen[str]], None]) -> tuple[int, int, str]:
    """What became of the script and its worker: the exit code, the worker's number, the errors."""
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:  # fmt: skip
        worker = int(line(process.stdout))
        threading.Event().wait(0.1)  # the next job has begun
        then(process)
        _, errors = process.communicate(timeout=30)
    return process.returncode, worker, errors


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


def test_a_worker_ends_with_its_parent(faulty: str, tmp_path: Path) -> None:
    code, worker, _ = script(tmp_path, lambda process: process.kill())
    assert code == -signal.SIGKILL
    assert is_gone(worker)


def test_ctrl_c_ends_both(faulty: str, tmp_path: Path) -> None:
    start = 0.0

    def press(process: subprocess.Popen[str]) -> None:
        nonlocal start
        start = monotonic()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group

    code, worker, errors = script(tmp_path, press)
    assert code == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert is_gone(worker, 0.1)
    assert monotonic() - start < 10  # not the 60 s of a job
