"""``convsched.compile``: a problem becomes a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from convsched.analytic import default_recipe
from convsched.errors import LoweringError, ScheduleError
from convsched.lower.direct import LAYOUTS
from convsched.machine import Machine, default_threads, has_schedules
from convsched.problem import Conv2d, Linear, Problem
from convsched.schedule import Schedule, parse_schedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from convsched.autotune.cache import ScheduleCache
    from convsched.autotune.record import Record
    from convsched.kernels.kernel import Kernel
    from convsched.recipes import Recipe

ALGORITHMS = ("direct",)
ACCURACIES = ("strict", "normal", "fast")
BACKENDS = ("llvm", "numba")


def compile(layer: Problem, *, algorithm: str | None = None, schedule: Schedule | str | None = None,
            threads: int | None = None, accuracy: Literal["strict", "normal", "fast"] = "normal",
            layout: Literal["nchw", "nhwc", "nchw16c"] = "nchw", cache: ScheduleCache | bool = True,
            backend: Literal["llvm", "numba"] = "llvm") -> Kernel:
    """Compile a layer for this machine; never measures.

    ``schedule``: a Schedule or its text; if None, the best that tuning left in the schedule cache, else the
    analytic default. ``cache``: a ScheduleCache, True for the one in the cache folder, False for none.
    ``threads``: how many run a call
    (default: CONVSCHED_THREADS, else the cores this process may use). ``layout``: of activations in and
    out: "nchw", "nhwc", or "nchw16c", (N, ceil(C/16), H, W, 16) with zero tails. ``accuracy``: the class of
    error allowed; direct convolution satisfies all. ``backend``: "llvm", or "numba" for the same nest as
    Numba source. Raises ScheduleError where a schedule does not fit, LoweringError for the rest.
    """
    if not isinstance(layer, Conv2d | Linear):
        raise LoweringError(f"compile takes a Conv2d or a Linear, not {type(layer).__name__}")
    _choose("algorithm", algorithm or "direct", ALGORITHMS)
    _choose("accuracy", accuracy, ACCURACIES)
    _choose("layout", layout, tuple(LAYOUTS))
    _choose("backend", backend, BACKENDS)
    if threads is None:
        threads = default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise LoweringError(f"threads={threads!r}: use a positive integer")
    machine = Machine.host()
    from convsched.kernels.kernel import Kernel
    from convsched.kernels.numba_kernel import NumbaKernel

    def build(schedule: Schedule, recipe: Recipe | None = None) -> Kernel:
        kind = Kernel if backend == "llvm" else NumbaKernel
        return kind(layer, schedule, layout=layout, threads=threads, machine=machine, recipe=recipe,
                    accuracy=accuracy)

    if isinstance(schedule, str):
        return build(parse_schedule(schedule))
    if isinstance(schedule, Schedule):
        return build(schedule)
    if schedule is not None:
        raise ScheduleError("schedule", f"is a {type(schedule).__name__}", "give a Schedule or its text")
    if cache is not False:
        kernel = _remembered(layer, machine, layout, threads, accuracy, cache, build)
        if kernel is not None:
            return kernel
    recipe = default_recipe(layer, machine, layout, threads)
    return build(recipe.schedule(layer, layout), recipe)


def _remembered(layer: Problem, machine: Machine, layout: str, threads: int, accuracy: str,
                cache: ScheduleCache | bool, build: Callable[[Schedule], Kernel]) -> Kernel | None:
    """A kernel of the schedule that tuning found; one that no longer fits is passed over."""
    if cache is True:
        if not has_schedules():
            return None
        from convsched.autotune.cache import ScheduleCache
        cache = ScheduleCache()
    assert not isinstance(cache, bool)
    from convsched.autotune.record import Key
    kernels: dict[str, Kernel] = {}

    def check(record: Record) -> None:
        kernels[record.schedule] = build(parse_schedule(record.schedule))

    hit = cache.best(Key.of(layer, machine, layout=layout, threads=threads, accuracy=accuracy), check=check)
    return None if hit is None else kernels[hit.record.schedule]


def _choose(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LoweringError(f"{name}={value!r}: use one of {', '.join(allowed)}")
