"""``convsched.compile``: a problem becomes a kernel."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from convsched.algorithms import named
from convsched.errors import LoweringError, ScheduleError
from convsched.machine import Machine, default_threads, has_schedules
from convsched.names import (
    ACCURACIES,
    ALGORITHMS,
    BACKENDS,
    LAYOUTS,
    MAX_THREADS,
    Accuracy,
    Backend,
    Layout,
)
from convsched.problem import Conv2d, Linear, Problem
from convsched.schedule import Schedule, parse_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import SupportsIndex

    from convsched.autotune.cache import ScheduleCache
    from convsched.autotune.record import Record
    from convsched.kernels.kernel import Kernel
    from convsched.recipes import Recipe


def compile(layer: Problem, *, algorithm: str | None = None, schedule: Schedule | str | None = None,
            threads: SupportsIndex | None = None, accuracy: Accuracy = "normal", layout: Layout = "nchw",
            cache: ScheduleCache | bool | None = None, backend: Backend = "llvm") -> Kernel:
    """Compile a layer for this machine; never measures.

    ``schedule``: a Schedule or its text; if None, the best that tuning left in the schedule cache, else the
    analytic default. ``cache``: a ScheduleCache, None or True for the one in the cache folder, False for none.
    ``threads``: how many run a call, at most 1024 (default: CONVSCHED_THREADS, else the cores this process may
    use). ``layout``: of activations in and out: "nchw", "nhwc", or "nchw16c", (N, ceil(C/16), H, W, 16) with
    zero tails. ``accuracy``: the class of error allowed; direct convolution satisfies all. ``backend``: "llvm",
    or "numba" for the same nest as Numba source. Raises ScheduleError where a schedule does not fit,
    LoweringError for the rest.
    """
    if not isinstance(layer, Conv2d | Linear):
        raise LoweringError(f"compile takes a Conv2d or a Linear, not {type(layer).__name__}")
    chosen = named("direct" if algorithm is None else algorithm, layer)
    _choose("accuracy", accuracy, ACCURACIES)
    _choose("layout", layout, LAYOUTS)
    _choose("backend", backend, BACKENDS)
    _check_cache(cache)
    count = min(default_threads(), MAX_THREADS) if threads is None else _thread_count(threads)
    machine = Machine.host()
    kind = _kernel_type(backend)

    def build(schedule: Schedule, recipe: Recipe | None = None) -> Kernel:
        return kind(layer, schedule, layout=layout, threads=count, machine=machine, algorithm=chosen.name,
                    recipe=recipe, accuracy=accuracy)

    if isinstance(schedule, str):
        return build(parse_schedule(schedule))
    if isinstance(schedule, Schedule):
        return build(schedule)
    if schedule is not None:
        raise ScheduleError("schedule", f"is a {type(schedule).__name__}", "give a Schedule or its text")
    if cache is not False and algorithm is None:
        kernel = _remembered(layer, machine, layout, count, accuracy, cache, build)
        if kernel is not None:
            return kernel
    recipe = chosen.default(machine, layout, count)
    return build(recipe.schedule(layer, layout), recipe)


def _kernel_type(backend: Backend) -> type[Kernel]:
    """The class of a backend's kernels; only the second one needs Numba, which is slow to import."""
    if backend == "numba":
        from convsched.kernels.numba_kernel import NumbaKernel
        return NumbaKernel
    from convsched.kernels.kernel import Kernel
    return Kernel


def _remembered(layer: Problem, machine: Machine, layout: str, threads: int, accuracy: str,
                cache: ScheduleCache | bool | None, build: Callable[[Schedule], Kernel]) -> Kernel | None:
    """A kernel of the schedule that tuning found; one that no longer fits is passed over."""
    if cache is None or isinstance(cache, bool):
        if not has_schedules():  # without one, the tuner's modules need not be imported
            return None
        from convsched.autotune.cache import ScheduleCache
        cache = ScheduleCache()
    from convsched.autotune.record import Key
    kernels: dict[str, Kernel] = {}

    def check(record: Record) -> None:
        kernels[record.schedule] = build(parse_schedule(record.schedule))

    hit = cache.best(Key.of(layer, machine, layout=layout, threads=threads, accuracy=accuracy), check=check)
    return None if hit is None else kernels[hit.record.schedule]


def _choose(name: str, value: object, allowed: Collection[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise LoweringError(f"{name}={value!r}: use one of {', '.join(allowed)}")


def _check_cache(cache: object) -> None:
    if cache is None or isinstance(cache, bool):
        return
    from convsched.autotune.cache import ScheduleCache
    if not isinstance(cache, ScheduleCache):
        raise LoweringError(f"cache={cache!r}: use a convsched.autotune.cache.ScheduleCache, None or True for the one "
                            "in the cache folder, or False for none")


def _thread_count(threads: object) -> int:
    rule = f"use an integer from 1 to {MAX_THREADS}, or None for the cores this process may use"
    try:
        count = operator.index(threads)  # type: ignore[arg-type]
    except TypeError:
        raise LoweringError(f"threads={threads!r}: {rule}") from None
    if isinstance(threads, bool) or not 1 <= count <= MAX_THREADS:
        raise LoweringError(f"threads={threads!r}: {rule}")
    return count
