"""A candidate, as the worker process sees it: compiled, checked, then timed in turn with the incumbent.

It is checked against the float64 oracle before it is timed, on small integers, whose float32 sums are exact.
One that is no slower than the incumbent is timed with cold weights too, and checked once more, since a kernel
that spoils its workspace is right only at first. A winner is no slower than the default, against which it runs
last: so both are known of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convsched.autotune.measure.evict import evict
from convsched.autotune.measure.measure import cold, race
from convsched.autotune.store.record import Status
from convsched.kernels.run.bound import BoundKernel
from convsched.kernels.run.kernel import Kernel
from convsched.machine import CpuCounters, cpu_counters, host
from convsched.machine.conditions import timing_flags
from convsched.plan.plan import Plan
from convsched.problem import Problem
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.reference import convolve

Floats = NDArray[np.float32]

MAGNITUDE = 3  # of the integers at most
INTEGER_ACTIVATIONS = (None, "relu", "relu6")  # activations that keep integers
COLD_ROUNDS, COLD_SECONDS = 3, 0.5  # the most
WINDOW_TICKS = (50, 1000)  # CPU ticks of measuring, 10 ms each, over which conditions are judged


@dataclass(frozen=True)
class Job:
    """One candidate, and the incumbent to time it against; None for none."""

    plan: Plan
    incumbent: Plan | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a job. Times are minima, seconds a call; nan where not measured.

    ``error`` is max |error| / rms of the output, ``workspace`` in bytes, ``flags`` name
    what disturbed the timing.
    """

    status: Status
    message: str = ""
    hot: float = float("nan")
    incumbent: float = float("nan")
    cold: float = float("nan")
    spread: float = 0.0
    samples: int = 0
    error: float = float("nan")
    workspace: int = 0
    flags: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """The time over the incumbent's in the same run; nan without one."""
        return self.hot / self.incumbent


def run_job(job: Job, compiled: Callable[[], object] = lambda: None) -> Outcome:
    """Compile, check, then time a candidate; ``compiled`` is called when nothing may disturb it any more."""
    try:
        return _run(job, compiled)
    except Exception as error:  # whatever a candidate raises costs only this candidate
        return Outcome("failed", ": ".join([type(error).__name__, *str(error).splitlines()[:1]]))


def _run(job: Job, compiled: Callable[[], object]) -> Outcome:
    alone = job.incumbent in (None, job.plan)
    incumbent = None if alone or job.incumbent is None else prepared(job.incumbent)  # first: kept longer
    candidate = prepared(job.plan)
    compiled()
    if (wrong := _wrong(candidate)) is not None:
        return wrong
    before = cpu_counters()
    timing, other = race(candidate.call, incumbent.call if incumbent else None)
    cold_seconds = float("nan")
    if other is None or timing.minimum <= other.minimum:
        flush = partial(evict, host.machine(), job.plan.target.threads)
        cold_seconds = cold(candidate.call, repeats=COLD_ROUNDS, flush=flush, keep=(candidate.x,),
                            budget=COLD_SECONDS).minimum
        if (wrong := _wrong(candidate)) is not None:
            return replace(wrong, message=f"after many calls, {wrong.message}")
    return Outcome("ok", "", timing.minimum, other.minimum if other else float("nan"), cold_seconds,
                   timing.spread, len(timing.samples), candidate.error(), candidate.conv.kernel.workspace_bytes,
                   _WATCH.flags(before))


def _wrong(candidate: Prepared) -> Outcome | None:
    """Call it once, and compare all it should have written; None if that is right."""
    candidate.out.fill(np.nan)
    candidate.call()
    error = candidate.error()
    kernel = candidate.conv.kernel
    algorithm = kernel.plan.algorithm
    if error <= (0.0 if candidate.data.exact and algorithm.is_exact else algorithm.tolerance()):
        return None
    return Outcome("wrong", f"max |error| / rms is {error:.3g}", error=error, workspace=kernel.workspace_bytes)


@dataclass(frozen=True, eq=False)
class Data:
    """What a problem is run on, in its own shapes; ``exact`` where float32 makes no error on it.

    ``expected`` is the oracle's answer, in float32 if exact, else float64; ``scale`` its rms.
    """

    x: Floats
    weight: Floats
    bias: Floats | None
    residual: Floats | None
    expected: NDArray[Any]
    scale: float
    exact: bool


@dataclass(frozen=True, eq=False)
class Prepared:
    """A compiled candidate with its weights, and arrays in its layout to call it with."""

    conv: BoundKernel
    data: Data
    x: Floats
    residual: Floats | None
    out: Floats

    def call(self) -> object:
        return self.conv(self.x, out=self.out, residual=self.residual)

    def error(self) -> float:
        """max |error| / rms of what the latest call wrote; infinite for nan."""
        expected = self.data.expected
        error = float(np.abs(from_layout(self.out, expected.shape, self.conv.kernel.layout) - expected).max())
        return error / self.data.scale if np.isfinite(error) else float("inf")


@lru_cache(maxsize=2)  # the incumbent and the candidate
def prepared(plan: Plan) -> Prepared:
    """A candidate, compiled."""
    data, layout, kernel = data_of(plan.problem), plan.target.layout, Kernel(plan)
    residual = None if data.residual is None else to_layout(data.residual, layout)
    return Prepared(kernel.bind(data.weight, data.bias), data, to_layout(data.x, layout), residual,
                    np.empty(kernel.y_shape, np.float32))


@lru_cache(maxsize=1)
def data_of(problem: Problem) -> Data:
    """Small integers for all arrays, and the oracle's answer."""
    random = np.random.default_rng(0)

    def integers(shape: tuple[int, ...]) -> Floats:
        return random.integers(-MAGNITUDE, MAGNITUDE + 1, shape, np.int8).astype(np.float32)

    x, weight = integers(problem.input_shape), integers(problem.weight_shape)
    bias = integers(problem.bias_shape) if problem.bias else None
    residual = integers(problem.output_shape) if problem.residual else None
    expected: NDArray[Any] = convolve(problem, x, weight, bias, residual)
    sums = MAGNITUDE**2 * problem.weights // problem.M + 2 * MAGNITUDE  # no sum of an output is greater
    exact = problem.activation in INTEGER_ACTIVATIONS and sums < 1 << 24
    scale = float(np.sqrt(np.vdot(expected, expected) / expected.size)) or 1.0
    return Data(x, weight, bias, residual, expected.astype(np.float32) if exact else expected, scale, exact)


@dataclass
class _Watch:
    """Judges timing conditions over the latest measurements as if nothing had been between them.

    A tick is as long as a short measurement: only many tell what share of the CPUs others used.
    """

    seen: CpuCounters = field(default_factory=CpuCounters)

    def flags(self, before: CpuCounters) -> tuple[str, ...]:
        """What has disturbed timing, with the time since ``before`` added."""
        after = cpu_counters()
        spans = [(getattr(after, name) - getattr(before, name), getattr(self.seen, name))
                 for name in vars(after)]
        self.seen = CpuCounters(*(new + old for new, old in spans))
        if self.seen.total < WINDOW_TICKS[0]:
            return ()
        since = CpuCounters(*(getattr(after, name) - seen for name, seen in vars(self.seen).items()))
        if self.seen.total > WINDOW_TICKS[1]:
            self.seen = CpuCounters()
        return timing_flags(since)


_WATCH = _Watch()
