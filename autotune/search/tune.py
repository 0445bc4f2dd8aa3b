"""``convsched.tune``: layers are tuned here, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from convsched.autotune.search.budget import Budget, Tuned
from convsched.autotune.search.tuner import Tuner
from convsched.autotune.store.cache import ScheduleCache
from convsched.machine import default_threads, host
from convsched.options import Accuracy
from convsched.plan.plan import Target
from convsched.problem import Conv2d, Linear, Problem

if TYPE_CHECKING:
    from distributed import Client


@overload
def tune(layer: Problem, *, budget: str = ..., threads: int | None = ..., layout: str = ..., accuracy: Accuracy = ...,
         algorithm: str | None = ..., cache: ScheduleCache | None = ..., client: Client | None = ...) -> Tuned: ...


@overload
def tune(layer: Sequence[Problem], *, budget: str = ..., threads: int | None = ..., layout: str = ...,
         accuracy: Accuracy = ..., algorithm: str | None = ..., cache: ScheduleCache | None = ...,
         client: Client | None = ...) -> list[Tuned]: ...


def tune(layer: Problem | Sequence[Problem], *, budget: str = "10s", threads: int | None = None, layout: str = "nchw",
         accuracy: Accuracy = "normal", algorithm: str | None = None, cache: ScheduleCache | None = None,
         client: Client | None = None) -> Tuned | list[Tuned]:
    """Search the best schedule of a layer, or of each of several, and remember it for ``compile``.

    ``budget``: for each layer, a time ("10s", "2m") or "100 candidates". The analytic default is measured first,
    so that the result is never slower. Every candidate is checked against a float64 oracle before it is timed.
    ``accuracy``: the class of error that algorithms may have; ``algorithm``: only schedules of this one.
    ``client``: a Dask client, whose workers then tune the layers, each for its own machine (extra ``cluster``).
    Raises TuneError; ClusterError where workers are lost.
    """
    layers = [layer] if isinstance(layer, Conv2d | Linear) else list(layer)
    records, each = cache or ScheduleCache(), Budget.parse(budget)
    if client is not None:
        from convsched.autotune.search.cluster import tune_on
        done = tune_on(client, [(one, each) for one in layers], cache=records, threads=threads, layout=layout,
                       accuracy=accuracy, algorithm=algorithm)
    else:
        target = Target(host.machine(), layout, threads or default_threads(), accuracy)
        with Tuner(records, target, algorithm) as tuner:
            done = [tuner.tune(one, each) for one in layers]
    return done[0] if isinstance(layer, Conv2d | Linear) else done
