"""``convsched.compile``: a problem, or a program, becomes a kernel."""

from __future__ import annotations

import operator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

from convsched.errors import LoweringError, ScheduleError
from convsched.ir import Program
from convsched.lazy import importing
from convsched.machine import default_threads, has_schedules, host
from convsched.options import ACCURACIES, BACKENDS, MAX_THREADS, Accuracy, Backend
from convsched.plan.choice import choices
from convsched.plan.families import Algorithm, named
from convsched.plan.plan import Plan, ProgramPlan, Target
from convsched.problem import Conv2d, Linear, Problem
from convsched.problem.layout import LAYOUTS, Layout
from convsched.schedule import Schedule, parse_schedule

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from typing import Any, SupportsIndex

    from convsched.autotune.store.cache import ScheduleCache
    from convsched.autotune.store.record import Record
    from convsched.kernels.run.code import Code
    from convsched.kernels.run.kernel import Kernel
    from convsched.kernels.run.program import ProgramKernel

PATIENCE = 0.3  # seconds to wait, once, for the lock of a schedule cache: without a record there is still the default


@overload
def compile(layer: Problem, *, algorithm: str | None = ..., schedule: Schedule | str | None = ...,
            threads: SupportsIndex | None = ..., accuracy: Accuracy = ..., layout: Layout = ...,
            cache: ScheduleCache | bool | None = ..., backend: Backend = ...,
            memory_limit: SupportsIndex | None = ...) -> Kernel: ...


@overload
def compile(layer: Program, *, schedule: Schedule | str | None = ..., threads: SupportsIndex | None = ...,
            backend: Backend = ..., memory_limit: SupportsIndex | None = ...) -> ProgramKernel: ...


def compile(layer: Problem | Program, *, algorithm: str | None = None, schedule: Schedule | str | None = None,
            threads: SupportsIndex | None = None, accuracy: Accuracy = "normal", layout: Layout = "nchw",
            cache: ScheduleCache | bool | None = None, backend: Backend = "llvm",
            memory_limit: SupportsIndex | None = None) -> Kernel | ProgramKernel:
    """Compile a layer for this machine; never measures. A program, such as a nest written by hand, is compiled with the
    steps of ``schedule``, if any, and called by the names of its tensors; see ``ProgramKernel``.

    ``algorithm``: "direct", "im2col", "winograd", or a member such as "winograd(4,3)"; if None, that of the best
    schedule that tuning left in the schedule cache, else the one with the least estimated time.
    ``schedule``: a Schedule or its text, of direct convolution unless an algorithm is named; if None, the best in
    the schedule cache, else the analytic default. ``cache``: a ScheduleCache, None or True for the one in the cache
    folder, False for none. ``threads``: how many run a call, at most 1024 (default: CONVSCHED_THREADS, else the
    cores this process may use). ``layout``: of activations in and out: "nchw", "nhwc", or "nchw16c",
    (N, ceil(C/16), H, W, 16) with zero tails. ``backend``: "llvm", or "numba" for the same nest as Numba source.

    ``accuracy``: the class of error allowed, as ``kernel.predicted_error`` tells it for independent data and for data
    of which one channel is far greater than all others. "strict" also keeps Inf and NaN of the input in the outputs
    that they reach by definition, and so takes direct and im2col only; the other classes may take algorithms that make
    NaN of whole tiles around them. An algorithm or a schedule that was asked for and does not fit is refused; where no
    algorithm fits, the most accurate one is used, with an AccuracyWarning. ``memory_limit``: the most
    ``kernel.workspace_bytes``: what a call uses in all threads beside its arrays and the bound weights,
    transformed ones included; None for no limit.

    Raises ScheduleError where a schedule does not fit, LoweringError for the rest.
    """
    if not isinstance(layer, Conv2d | Linear | Program):
        raise LoweringError(f"compile takes a Conv2d, a Linear or a convsched.ir.Program, not {type(layer).__name__}")
    _choose("accuracy", accuracy, ACCURACIES)
    _choose("layout", layout, LAYOUTS)
    _choose("backend", backend, BACKENDS)
    _check_cache(cache)
    count = min(default_threads(), MAX_THREADS) if threads is None else _thread_count(threads)
    target = Target(host.machine(), layout, count, accuracy)
    if isinstance(layer, Program):
        if algorithm is not None or target != Target(target.machine, threads=count):
            raise LoweringError("compile of a program takes schedule, threads, backend and memory_limit: algorithm, "
                                "layout and accuracy are those of its nest; leave them out")
        plan = ProgramPlan(layer, target, _schedule("" if schedule is None else schedule))
        return _compile_program(plan, _code_type(backend), _memory_limit(memory_limit))
    chosen = None if algorithm is None else named(algorithm, layer)
    request = _Request(layer, target, chosen, _code_type(backend), _memory_limit(memory_limit))
    if schedule is not None:
        given = chosen or named("direct", layer)
        given.require(accuracy)
        return request.within_limit(request.build(Plan(layer, request.target, given, _schedule(schedule))))
    if chosen is not None:
        chosen.require(accuracy)
    kernel = None if cache is False else _remembered(request, cache)
    return kernel or request.default()


def compile_each(layers: Iterable[Problem], **options: Any) -> list[Kernel]:
    """Compile several layers, such as those of a network, on all cores this process may use; equal ones once.

    ``options`` are those of ``compile``. The kernels come in the order of the layers. Raises what ``compile`` raises
    for the first layer that fails, after those that were begun have ended.
    """
    if isinstance(layers, Conv2d | Linear):
        raise LoweringError("compile_each takes several layers, such as a list; use compile for one")
    wanted = list(layers)
    for layer in wanted:
        if not isinstance(layer, Conv2d | Linear):
            raise LoweringError(f"compile_each takes layers, each a Conv2d or a Linear, not {type(layer).__name__}")
    distinct = list(dict.fromkeys(wanted))
    with ThreadPoolExecutor(max(1, min(host.machine().cores, len(distinct)))) as pool:
        made = dict(zip(distinct, pool.map(lambda layer: compile(layer, **options), distinct), strict=True))
    return [made[layer] for layer in wanted]


def _compile_program(plan: ProgramPlan, code: type[Code], limit: int | None) -> ProgramKernel:
    with importing:
        from convsched.kernels.run.program import ProgramKernel
    kernel = ProgramKernel(plan, code)
    if limit is not None and kernel.workspace_bytes > limit:
        raise LoweringError(_beyond(limit, kernel, plan.source.name))
    return kernel


def _beyond(limit: int | None, kernel: Kernel | ProgramKernel, what: str, of: str = "") -> str:
    """Why a kernel is not within the limit of memory."""
    return (f"memory_limit={limit}: {what} needs a workspace of {kernel.workspace_bytes} bytes{of} on {kernel.threads} "
            f"thread{'s' * (kernel.threads != 1)}; give at least that, or None")


@dataclass(frozen=True)
class _Request:
    """What ``compile`` was asked: a layer for a target, and the limits of this request: one ``algorithm``, what makes
    the ``code``, and the most bytes of workspace."""

    layer: Problem
    target: Target
    algorithm: Algorithm | None
    code: type[Code]
    limit: int | None

    def choices(self) -> Iterable[Algorithm]:
        """The algorithms that may be used without measuring; the most accurate one where none fits the class."""
        return [self.algorithm] if self.algorithm else choices(self.layer, self.target)

    def build(self, plan: Plan) -> Kernel:
        with importing:
            from convsched.kernels.run.kernel import Kernel
        return Kernel(plan, self.code)

    def fits(self, kernel: Kernel) -> bool:
        return self.limit is None or kernel.workspace_bytes <= self.limit

    def within_limit(self, kernel: Kernel) -> Kernel:
        """The kernel itself, or a LoweringError with the numbers."""
        if not self.fits(kernel):
            raise LoweringError(_beyond(self.limit, kernel, kernel.algorithm,
                                        f" for {self.layer.text} in {kernel.layout}"))
        return kernel

    def default(self) -> Kernel:
        """The default of the first algorithm that stays within the limit, with smaller blocks if need be."""
        least: Kernel | None = None
        for algorithm in self.choices():
            kernel = self._smaller(Plan.of(algorithm, self.target))
            if least is None or kernel.workspace_bytes < least.workspace_bytes:
                least = kernel
            if self.fits(kernel):
                break
        assert least is not None
        return self.within_limit(least)

    def _smaller(self, plan: Plan) -> Kernel:
        """The kernel of a recipe, whose block is divided until the workspace fits or no smaller one is left."""
        kernel, recipe = self.build(plan), plan.recipe
        assert recipe is not None
        size: int = getattr(recipe, "block", 1)
        while self.limit is not None and not self.fits(kernel) and size > 1:
            most = max(1, min(size * self.limit // kernel.workspace_bytes, size - 1))
            size = max(b for b in range(1, most + 1) if size % b == 0)
            recipe = replace(recipe, block=size)
            kernel = self.build(Plan.of(plan.algorithm, self.target, recipe))
        return kernel

    def remembered(self, record: Record) -> Kernel | None:
        """The kernel of a record, None where it is not what is asked for. Raises ConvschedError where it no longer
        fits."""
        if self.algorithm is not None and record.algorithm != self.algorithm.name:
            return None
        plan, accuracy = record.plan(self.target.machine), self.target.accuracy
        if not plan.algorithm.fits(accuracy) and plan.algorithm not in self.choices():
            plan.algorithm.require(accuracy)
        kernel = self.build(plan)
        return kernel if self.fits(kernel) else None


def _code_type(backend: Backend) -> type[Code]:
    """What makes the code of a backend; only the second one needs Numba, which is slow to import."""
    if backend == "numba":
        with importing:
            from convsched.kernels.source.code import NumbaCode
        return NumbaCode
    with importing:
        from convsched.kernels.run.code import Code
    return Code


def _remembered(request: _Request, cache: ScheduleCache | bool | None) -> Kernel | None:
    """A kernel of the best schedule that tuning found and that is as asked for; one that no longer fits is passed
    over, with a warning."""
    if cache is None or isinstance(cache, bool):
        if not has_schedules():  # without one, the tuner's modules need not be imported
            return None
        with importing:
            from convsched.autotune.store.cache import ScheduleCache
        cache = ScheduleCache(patience=PATIENCE)
    with importing:
        from convsched.autotune.store.record import Key
    found: list[Kernel] = []

    def accept(record: Record) -> bool:
        kernel = request.remembered(record)
        found.extend([kernel] if kernel else [])
        return kernel is not None

    cache.best(Key.of(request.layer, request.target), accept=accept)
    return found[0] if found else None


def _choose(name: str, value: object, allowed: Collection[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise LoweringError(f"{name}={value!r}: use one of {', '.join(allowed)}")


def _schedule(schedule: object) -> Schedule:
    if not isinstance(schedule, Schedule | str):
        raise ScheduleError("schedule", f"is a {type(schedule).__name__}", "give a Schedule or its text")
    return parse_schedule(schedule) if isinstance(schedule, str) else schedule


def _check_cache(cache: object) -> None:
    if cache is None or isinstance(cache, bool):
        return
    with importing:
        from convsched.autotune.store.cache import ScheduleCache
    if not isinstance(cache, ScheduleCache):
        raise LoweringError(f"cache={cache!r}: use a convsched.autotune.store.cache.ScheduleCache, None or True for "
                            "the one in the cache folder, or False for none")


def _thread_count(threads: object) -> int:
    rule = f"use an integer from 1 to {MAX_THREADS}, or None for the cores this process may use"
    try:
        count = operator.index(threads)  # type: ignore[arg-type]
    except TypeError:
        raise LoweringError(f"threads={threads!r}: {rule}") from None
    if isinstance(threads, bool) or not 1 <= count <= MAX_THREADS:
        raise LoweringError(f"threads={threads!r}: {rule}")
    return count


def _memory_limit(limit: object) -> int | None:
    if limit is None:
        return None
    rule = "use bytes of workspace, an integer from 0, or None for no limit"
    try:
        size = operator.index(limit)  # type: ignore[arg-type]
    except TypeError:
        raise LoweringError(f"memory_limit={limit!r}: {rule}") from None
    if isinstance(limit, bool) or size < 0:
        raise LoweringError(f"memory_limit={limit!r}: {rule}")
    return size
