"""The benchmark of all layers of a network: each compiled, checked, and timed against NumPy.

A layer's answer is checked against the float64 oracle before it is timed: max |error| / rms(output) must
be within the bound of the class of accuracy. The kernel and the baseline (im2col and one matrix product, the
same number of threads) are timed in turn, so that both meet the same machine; times are minima. FLOP/s count
a layer's multiply-accumulates by definition, so that a fast algorithm can exceed the peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from convsched.algebra.accuracy import BOUNDS
from convsched.autotune.measure.measure import Timing, interleave, once
from convsched.benchmark.baseline import gemm_baseline
from convsched.benchmark.blas import blas_threads
from convsched.benchmark.cases import Array, Arrays, Case, make_arrays, relative_error
from convsched.errors import ConvschedError, LoweringError
from convsched.options import Accuracy
from convsched.plan.families import named
from convsched.problem import Linear, Problem
from convsched.problem.layout import from_layout, to_layout
from convsched.problem.reference import convolve, not_finite


class Compiled(Protocol):
    """What the job needs of a compiled kernel."""

    @property
    def algorithm(self) -> Any: ...

    @property
    def schedule(self) -> Any: ...

    @property
    def recipe(self) -> Any:
        """What made the schedule, where that is the analytic default; None for one from the schedule cache."""

    def bind(self, weight: Array, bias: Array | None) -> Callable[..., Array]: ...


Compile = Callable[..., Compiled]
"""`convsched.compile`: problem, threads and layout to a kernel."""


@dataclass(frozen=True)
class Settings:
    """How to run: threads of a kernel, the layout of its arrays, seconds of timing a layer, an image; the class
    of accuracy, and the algorithm of all layers to which it applies (None: each layer's best)."""

    threads: int = 1
    layout: str = "nchw"
    seconds: float = 0.5
    image: Array | None = None
    accuracy: Accuracy = "normal"
    algorithm: str | None = None


@dataclass(frozen=True)
class Row:
    """One layer's result. Where it could not be compiled or run, `failure` says why and the rest is empty, as it is
    where the algorithm asked for does not apply; `inapplicable` then says why. Where the layer's data or its right
    output are not finite, which is no fault of a kernel, there is nothing to compare; `not_finite` then says what.

    `tuned`: whether the schedule is from the schedule cache, and not the analytic default. `error` is
    max |error| / rms(output), and at most `bound`; times are seconds of one execution of the layer.
    """

    name: str
    problem: Problem
    count: int
    algorithm: str = ""
    schedule: str = ""
    tuned: bool = False
    error: float = float("nan")
    compile_seconds: float = float("nan")
    kernel: Timing | None = None
    baseline: Timing | None = None
    failure: str = ""
    inapplicable: str = ""
    not_finite: str = ""
    bound: float = BOUNDS["normal"]

    @property
    def status(self) -> str:
        """ok, WRONG (the answer is not within the bound), FAILED (there is no answer), n/a (not asked for) or
        not finite (there is no right answer)."""
        if self.inapplicable:
            return "n/a"
        if self.failure:
            return "FAILED"
        if self.not_finite:
            return "not finite"
        return "ok" if self.error <= self.bound else "WRONG"

    @property
    def reason(self) -> str:
        """Why there are no numbers; empty where there are."""
        return self.failure or self.inapplicable or self.not_finite

    @property
    def flops_per_second(self) -> float:
        """The rate of the layer's FLOPs by definition; NaN where it was not timed."""
        return self.problem.flops / self.kernel.minimum if self.kernel else float("nan")

    @property
    def speedup(self) -> float:
        """How many times the baseline's speed."""
        return self.baseline.minimum / self.kernel.minimum if self.kernel and self.baseline else float("nan")


@dataclass(frozen=True)
class Total:
    """All timed layers of a network, each as often as it occurs; seconds, and the FLOPs of a run."""

    layers: int
    seconds: float
    baseline_seconds: float
    flops: int
    compile_seconds: float


def run_layers(cases: Iterable[Case], compile_layer: Compile, settings: Settings) -> Iterator[Row]:
    """Benchmarks layer after layer; every row is complete when it is yielded."""
    with blas_threads(settings.threads):
        for case in cases:
            yield _run_layer(case, compile_layer, settings)


def total(rows: Iterable[Row]) -> Total:
    """The network's weighted sums over the rows that were timed."""
    timed = [(row, row.kernel, row.baseline) for row in rows]
    pairs = [(row, kernel, baseline) for row, kernel, baseline in timed if kernel and baseline]
    return Total(
        layers=sum(row.count for row, _, _ in pairs),
        seconds=sum(row.count * kernel.minimum for row, kernel, _ in pairs),
        baseline_seconds=sum(row.count * baseline.minimum for row, _, baseline in pairs),
        flops=sum(row.count * row.problem.flops for row, _, _ in pairs),
        compile_seconds=sum(row.compile_seconds for row, _, _ in pairs),
    )


def _run_layer(case: Case, compile_layer: Compile, settings: Settings) -> Row:
    """One layer. An error raised on purpose or a lack of memory becomes a row that tells it; the others still run."""
    problem = case.problem
    layout = "nchw" if isinstance(problem, Linear) else settings.layout
    if settings.algorithm is not None:
        try:
            named(settings.algorithm, problem)
        except LoweringError as reason:
            return Row(case.name, problem, case.count, inapplicable=str(reason))
    try:
        return _measure_layer(case, compile_layer, settings, layout)
    except ConvschedError as failure:
        return Row(case.name, problem, case.count, failure=str(failure))
    except MemoryError as failure:
        return Row(case.name, problem, case.count, failure=f"there is not enough memory: {failure}")


def _measure_layer(case: Case, compile_layer: Compile, settings: Settings, layout: str) -> Row:
    """One layer, compiled and checked, and timed if its answer is right."""
    problem = case.problem
    kernel, compile_seconds = once(
        lambda: compile_layer(problem, threads=settings.threads, layout=layout, accuracy=settings.accuracy,
                              algorithm=settings.algorithm)
    )
    arrays = make_arrays(case, settings.image)
    if flaw := arrays.flaw():
        return Row(case.name, problem, case.count, not_finite=f"{case.name}: {flaw}")
    call, output = bound_call(kernel, problem, arrays, layout)
    call()
    expected = convolve(problem, arrays.x, arrays.weight, arrays.bias, arrays.residual)
    if flaw := not_finite(_rounded(expected)):
        return Row(case.name, problem, case.count, not_finite=f"{case.name}: {flaw} of its right outputs are "
                   "beyond float32")
    error = relative_error(from_layout(output, problem.output_shape, layout), expected)
    row = Row(
        case.name, problem, case.count, str(kernel.algorithm), str(kernel.schedule), kernel.recipe is None,
        error, compile_seconds, bound=BOUNDS[settings.accuracy],
    )  # fmt: skip
    if row.status != "ok":
        return row
    timings = interleave(
        {
            "kernel": call,
            "baseline": lambda: gemm_baseline(
                problem, arrays.x, arrays.weight, arrays.bias, arrays.residual
            ),
        },
        repeats=1000,
        budget=settings.seconds,
    )
    return replace(row, kernel=timings["kernel"], baseline=timings["baseline"])


def _rounded(expected: NDArray[np.float64]) -> Array:
    """The truth in float32, infinite where that has no number for it."""
    with np.errstate(over="ignore"):
        return expected.astype(np.float32)


def bound_call(
    kernel: Compiled, problem: Problem, arrays: Arrays, layout: str
) -> tuple[Callable[[], object], Array]:
    """A call of a kernel with its weights bound that allocates nothing, and the array that it writes."""
    conv = kernel.bind(arrays.weight, arrays.bias)
    x = to_layout(arrays.x, layout)
    output = np.full_like(to_layout(np.zeros(problem.output_shape, np.float32), layout), np.nan)
    if arrays.residual is None:
        return (lambda: conv(x, out=output)), output
    residual = to_layout(arrays.residual, layout)
    return (lambda: conv(x, out=output, residual=residual)), output
