"""``convsched.compile``: a problem becomes a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from convsched.analytic import default_recipe
from convsched.errors import LoweringError, ScheduleError
from convsched.lower.direct import LAYOUTS
from convsched.machine import Machine, default_threads
from convsched.problem import Conv2d, Linear, Problem
from convsched.schedule import Schedule, parse_schedule

if TYPE_CHECKING:
    from convsched.kernels.kernel import Kernel

ALGORITHMS = ("direct",)
ACCURACIES = ("strict", "normal", "fast")
BACKENDS = ("llvm", "numba")


def compile(layer: Problem, *, algorithm: str | None = None, schedule: Schedule | str | None = None,
            threads: int | None = None, accuracy: Literal["strict", "normal", "fast"] = "normal",
            layout: Literal["nchw", "nhwc", "nchw16c"] = "nchw",
            backend: Literal["llvm", "numba"] = "llvm") -> Kernel:
    """Compile a layer for this machine; never measures.

    ``schedule``: a Schedule or its text; the analytic default if None. ``threads``: how many run a call
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
    recipe = None
    if schedule is None:
        recipe = default_recipe(layer, machine, layout, threads)
        schedule = recipe.schedule(layer, layout)
    elif isinstance(schedule, str):
        schedule = parse_schedule(schedule)
    elif not isinstance(schedule, Schedule):
        raise ScheduleError("schedule", f"is a {type(schedule).__name__}", "give a Schedule or its text")
    from convsched.kernels.kernel import Kernel
    from convsched.kernels.numba_kernel import NumbaKernel
    kind = Kernel if backend == "llvm" else NumbaKernel
    return kind(layer, schedule, layout=layout, threads=threads, machine=machine, recipe=recipe,
                accuracy=accuracy)


def _choose(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LoweringError(f"{name}={value!r}: use one of {', '.join(allowed)}")
