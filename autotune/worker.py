"""Candidates run in a process of their own: a crash, a hang or a leak costs one candidate.

The worker is spawned, never forked (a forked copy of a process that has compiled may deadlock). It checks a
candidate against the float64 oracle before it times it, on small integers where the result is exact, and it
times it in turn with the incumbent. It is replaced after a number of candidates, since what a compiler
leaks is never given back, and when it dies or exceeds its time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np

from convsched.errors import ConvschedError
from convsched.machine import Machine
from convsched.problem import Problem, parse_problem

Status = Literal["ok", "wrong", "crashed", "timed out", "failed"]

ROUNDS, FIRST_ROUNDS = 12, 3
CUT = 1.15  # a candidate this much slower than the incumbent after the first rounds is timed no more
JOBS_PER_PROCESS = 200
TOLERANCE = 2e-5  # of max |error| / rms, where an activation makes the result inexact


@dataclass(frozen=True)
class Job:
    """One candidate, and the incumbent to time it against ("" for none)."""

    problem: str
    layout: str
    threads: int
    schedule: str
    incumbent: str = ""
    cold: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job. Times are minima, seconds a call; nan where not measured."""

    status: Status
    message: str = ""
    hot: float = float("nan")
    incumbent: float = float("nan")
    cold: float = float("nan")
    spread: float = 0.0
    samples: int = 0
    error: float = float("nan")
    workspace: int = 0

    @property
    def ratio(self) -> float:
        """The time over the incumbent's in the same run; nan without one."""
        return self.hot / self.incumbent


class WorkerError(ConvschedError):
    """A worker process that cannot be started."""


class Worker:
    """A process that runs jobs one at a time; started at the first job, replaced when needed."""

    def __init__(self, timeout: float = 60.0, target: Callable[[Connection], None] | None = None) -> None:
        """``timeout``: seconds a job may take; ``target``: what the process runs instead of ``serve``."""
        self.timeout = timeout
        self._target = target or serve
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._connection: Connection | None = None
        self._jobs = 0

    def run(self, job: Job) -> Outcome:
        """Run a job; a worker that dies or hangs is an outcome, not an error."""
        if self._process is None or self._jobs >= JOBS_PER_PROCESS:
            self.start()
        assert self._connection is not None
        self._jobs += 1
        try:
            self._connection.send(job)
            if not self._connection.poll(self.timeout):
                self.close()
                return Outcome("timed out", f"no answer in {self.timeout:g} s")
            outcome: Outcome = self._connection.recv()
            return outcome
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            return Outcome("crashed", f"the process ended with {code}")
        except BaseException:
            self.close()  # its answer to this job must not be taken for that to the next
            raise

    def start(self) -> None:
        """Start a process now, so that the first job does not wait for it. Raises WorkerError."""
        self.close()
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=self._target, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        try:
            ready = self._connection.poll(self.timeout) and self._connection.recv()
        except (EOFError, ConnectionResetError):
            ready = None
        if not ready:
            self.close()
            raise WorkerError("the process that runs candidates did not start: a script that tunes needs "
                              'if __name__ == "__main__": around what it does')
        self._jobs = 0

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(connection: Connection) -> None:
    """The worker's loop: a job in, its outcome out, until the other end closes."""
    import convsched.kernels.kernel  # imported before the first job, whose time it would count against

    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        connection.send(convsched.kernels.kernel.__name__)
        while True:
            connection.send(run_job(connection.recv()))


def run_job(job: Job) -> Outcome:
    """Compile, check, then time a candidate."""
    try:
        return _run(job)
    except Exception as error:  # whatever a candidate raises costs only this candidate
        return Outcome("failed", ": ".join([type(error).__name__, *str(error).splitlines()[:1]]))


def _run(job: Job) -> Outcome:
    from convsched.autotune.evict import evict
    from convsched.autotune.measure import interleave, once

    call, error, workspace, exact = _prepared(job.problem, job.layout, job.threads, job.schedule)
    if not error <= (0.0 if exact else TOLERANCE):
        return Outcome("wrong", f"max |error| / rms is {error:.3g}", error=error, workspace=workspace)
    calls = {"candidate": call}
    if job.incumbent and job.incumbent != job.schedule:
        calls["incumbent"] = _prepared(job.problem, job.layout, job.threads, job.incumbent)[0]
    timings = interleave(calls, repeats=FIRST_ROUNDS)
    slow = "incumbent" in timings and timings["candidate"].minimum > CUT * timings["incumbent"].minimum
    if not slow:
        timings = interleave(calls, repeats=ROUNDS)
    cold = float("nan")
    if job.cold and not slow:
        cold = min(_cold_sample(call, evict, once) for _ in range(3))
    timing, incumbent = timings["candidate"], timings.get("incumbent")
    return Outcome("ok", "", timing.minimum, incumbent.minimum if incumbent else float("nan"), cold,
                   timing.spread, len(timing.samples), error, workspace)


def _cold_sample(call: Any, evict: Any, once: Any) -> float:
    """One call's seconds with the caches emptied first, outside the timed region."""
    evict(Machine.host())
    return float(once(call)[1])


@lru_cache(maxsize=4)
def _prepared(problem_text: str, layout: str, threads: int, schedule: str) -> tuple[Any, float, int, bool]:
    """A call of the bound kernel, its error against the oracle, its workspace, and whether 0 is expected."""
    from convsched.kernels.arrays import from_layout, to_layout
    from convsched.kernels.kernel import Kernel
    from convsched.schedule import parse_schedule

    problem = parse_problem(problem_text)
    x, weight, bias, residual, expected = _data(problem_text)
    kernel = Kernel(problem, parse_schedule(schedule), layout=layout, threads=threads, machine=Machine.host())
    conv = kernel.bind(weight, bias)
    x = to_layout(x, layout)
    residual = None if residual is None else to_layout(residual, layout)
    out = np.full(kernel.y_shape, np.nan, np.float32)  # what is not written is wrong
    conv(x, out=out, residual=residual)
    got = from_layout(out, problem.output_shape, layout)
    scale = float(np.sqrt(np.mean(expected**2))) or 1.0
    difference = np.abs(got - expected)
    error = float(difference.max()) / scale if np.isfinite(difference).all() else float("inf")
    exact = problem.activation in (None, "relu", "relu6")
    return (lambda: conv(x, out=out, residual=residual)), error, kernel.workspace_bytes, exact


@lru_cache(maxsize=2)
def _data(problem_text: str) -> tuple[Any, ...]:
    """Small integers for all arrays, so that float32 sums are exact, and the oracle's answer."""
    from convsched.reference import convolve

    problem: Problem = parse_problem(problem_text)
    rng = np.random.default_rng(0)

    def integers(shape: tuple[int, ...]) -> Any:
        return rng.integers(-3, 4, shape).astype(np.float32)

    x, weight = integers(problem.input_shape), integers(problem.weight_shape)
    bias = integers(problem.bias_shape) if problem.bias else None
    residual = integers(problem.output_shape) if problem.residual else None
    return x, weight, bias, residual, convolve(problem, x, weight, bias, residual)
